"""The other objectives on whole models against TRL: images, tokens and adapters included; loss and every gradient.

DPO's losses and KTO run in TRL's own trainers. CPO and ORPO do so too, on text, as TRL's know no images. TRL's reward trainer
knows no vision-language model, so its loss gets the scores of plain rows, by transformers' own forward.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer
from trl import KTOConfig, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from rayalign.algorithms import CPO, DPO, KTO, ORPO, RM, Algorithm, SimPO
from rayalign.config.sections import OptimizerConfig
from rayalign.data.store import EncodedPair
from rayalign.policy.policy import Policy
from rayalign.training.loop import Trainer
from tests.parity.conftest import RecordDifference
from tests.parity.trl_models import (
    ALL_KINDS,
    BETA,
    TOLERANCE,
    TRL,
    Examples,
    Pair,
    Step,
    bare,
    collate,
    differences,
    draw_adapter,
    encode,
    give_adapter,
    gradients_of,
    images_of,
    lora_of,
    make_policy,
    make_trl,
    our_step,
    plain_model,
    relative_distance,
    trl_example,
    trl_prompt,
    trl_settings,
    trl_step,
)
from tests.tiny_models import FAMILIES, counts_of, make_batch, save_tiny_model

pytestmark = [
    # TRL and peft still use the older of transformers' two names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

CUTS: dict[str, list[list[list[int]]]] = {
    "one batch": [[[0, 1, 2, 3, 4]]],
    "two workers, three batches": [[[4, 1], [0]], [[2, 3]]],
}
"""Workers have micro-batches, which are lists of pair numbers."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family with its processor."""
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("one_family"), "llava_next")


def ours(
    folder: Path, policy: Policy, algorithm: Algorithm, pairs: Sequence[EncodedPair], cut: Sequence[Sequence[Sequence[int]]]
) -> Step:
    """A step of ours; mismatched rows have the responses of the pair before, as TRL's collator makes them."""

    def batch_of(numbers: Sequence[int]) -> Any:
        partners = [pairs[i - 1] for i in numbers]
        return make_batch(folder, [pairs[i] for i in numbers], needs=algorithm.needs, partners=partners)

    return our_step(policy, algorithm, [[batch_of(numbers) for numbers in batches] for batches in cut], counts_of(pairs))


def assert_same(step: Step, expected: Step) -> dict[str, float]:
    assert step[0] == pytest.approx(expected[0], rel=TOLERANCE, abs=TOLERANCE)
    assert relative_distance(step[1], expected[1]) < TOLERANCE
    assert max(gradient.abs().max().item() for gradient in expected[1].values()) > 1e-3
    return differences(step, expected)


# --- DPO's family

DPOS = [
    DPO(loss_type=("ipo",), beta=BETA, rpo_alpha=0),
    DPO(loss_type=("aot",), beta=BETA, rpo_alpha=0, label_smoothing=0.1),
    DPO(loss_type=("aot_unpaired",), beta=BETA, rpo_alpha=0),
    DPO(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), beta=BETA, rpo_alpha=0),
    DPO(f_divergence_type="js_divergence", ld_alpha=0.3, beta=BETA, rpo_alpha=0),
]


@pytest.mark.parametrize("algorithm", DPOS, ids=["ipo", "aot", "aot_unpaired", "MPO", "js and length-desensitised"])
def test_loss_and_every_gradient_of_dpos_family_are_trls(
    folder: Path, tmp_path: Path, algorithm: DPO, record_difference: RecordDifference
) -> None:
    trainer = make_trl(
        folder,
        tmp_path,
        ALL_KINDS,
        loss_type=list(algorithm.loss_type),
        loss_weights=list(algorithm.loss_weights) or None,
        label_smoothing=algorithm.label_smoothing,
        f_divergence_type=algorithm.f_divergence_type,
        ld_alpha=algorithm.ld_alpha,
    )
    policy = make_policy(folder)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    expected = trl_step(trainer, [collate(trainer, ALL_KINDS)])
    for cut in CUTS.values():
        found = assert_same(ours(folder, policy, algorithm, encode(folder, ALL_KINDS), cut), expected)
        record_difference("dpo, whole model", TRL, **found)


# --- KTO


def make_kto(folder: Path, output: Path, responses: Sequence[dict[str, Any]], algorithm: KTO) -> KTOTrainer:
    model = plain_model(folder)
    settings = trl_settings(output, batch_size=len(responses)) | {
        "beta": algorithm.beta,
        "desirable_weight": algorithm.desirable_weight,
        "undesirable_weight": algorithm.undesirable_weight,
        "train_sampling_strategy": "sequential",
    }
    return KTOTrainer(
        model=model,
        args=KTOConfig(**settings),
        train_dataset=Examples(responses),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=lora_of(model),
    )


def labelled(pair: Pair, side: str) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": getattr(pair, side)}]
    return {"images": images_of(pair), "prompt": trl_prompt(pair), "completion": completion, "label": side == "chosen"}


@pytest.mark.parametrize("kind", ["pairs", "single responses"])
def test_loss_kl_and_every_gradient_of_kto_are_trls(
    folder: Path, tmp_path: Path, kind: str, record_difference: RecordDifference
) -> None:
    algorithm = KTO(beta=0.2, desirable_weight=0.7, undesirable_weight=1.5)
    encoded = encode(folder, ALL_KINDS)
    if kind == "pairs":
        # TRL puts to each example's prompt the completion of the example before, to the first one's the last. With the good
        # responses first and the bad ones after them, each prompt gets in all both responses of the pair before.
        responses = [labelled(pair, side) for side in ("chosen", "rejected") for pair in ALL_KINDS]
    else:
        sides = ["chosen", "rejected", "rejected", "chosen", "rejected"]
        responses = [labelled(pair, side) for pair, side in zip(ALL_KINDS, sides, strict=True)]
        encoded = [
            dataclasses.replace(pair, **{"rejected_ids" if side == "chosen" else "chosen_ids": []})
            for pair, side in zip(encoded, sides, strict=True)
        ]
    trainer = make_kto(folder, tmp_path, responses, algorithm)
    policy = make_policy(folder, needs=algorithm.needs)
    give_adapter(trainer.model, draw_adapter(policy, seed=4))

    expected = trl_step(trainer, [trainer.data_collator([dict(response) for response in responses])])

    (kl,) = trainer._metrics["train"]["kl"]
    assert kl > 0.1
    batch = make_batch(folder, encoded, needs=algorithm.needs, partners=[encoded[-1], *encoded[:-1]])
    metrics, _ = Trainer(policy, algorithm, OptimizerConfig(), num_steps=1).evaluate(lambda: [batch], counts_of(encoded))
    # A mean of differences of log-probs of order 100.
    assert metrics["kl"] == pytest.approx(kl, abs=100 * TOLERANCE)
    for cut in CUTS.values():
        found = assert_same(ours(folder, policy, algorithm, encoded, cut), expected)
        record_difference("kto, whole model", TRL, **found)


# --- the reward model


class ScoredRows(nn.Module):
    """A plain reward model: transformers' forward of two-part rows, a linear head on the last real token's state."""

    def __init__(self, model: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.model = model
        self.v_head = nn.Parameter(head.clone())

    def forward(self, *, margin: Tensor, **inputs: Tensor) -> SimpleNamespace:
        hidden = self.model.get_base_model().model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return SimpleNamespace(logits=hidden[torch.arange(len(hidden)), last] @ self.v_head.t())


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_loss_and_every_gradient_of_a_reward_model_are_trls_on_scores_of_plain_rows(
    folder: Path, coefficient: float, record_difference: RecordDifference
) -> None:
    algorithm = RM(center_rewards_coefficient=coefficient)
    policy = make_policy(folder, needs=algorithm.needs)
    weights = draw_adapter(policy, seed=1)
    margins = [0.5, 0.0, 0.25, 0.0, 1.0]
    encoded = [dataclasses.replace(p, margin=m) for p, m in zip(encode(folder, ALL_KINDS), margins, strict=True)]

    model = plain_model(folder)
    scored = ScoredRows(get_peft_model(model, lora_of(model)), policy.value_head.summary.weight.detach())
    give_adapter(scored.model, weights)
    collator = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(folder), max_length=None)
    batch = dict(collator([trl_example(pair) for pair in ALL_KINDS]))
    del batch["completion_mask"]
    trainer = bare(RewardTrainer, scored, args=SimpleNamespace(center_rewards_coefficient=coefficient or None))
    loss = trainer.compute_loss(scored, {**batch, "margin": torch.tensor(margins)})
    loss.backward()
    gradients = gradients_of(scored.model) | {"v_head.summary.weight": scored.v_head.grad}

    for cut in CUTS.values():
        found = assert_same(ours(folder, policy, algorithm, encoded, cut), (loss.item(), gradients))
        record_difference("rm, whole model", TRL, **found)


# --- CPO, SimPO and ORPO, on text

TEXTS = [
    Pair((("user", "Which digit is it?"),), (), " two", " A cat sits on it."),
    Pair((("user", "describe the mat."),), (), " A cat sits.", " The digit on the mat is not two, it is six."),
    Pair((("system", "describe the image."), ("user", "Is it a digit?")), (), " It is a digit, it is two.", " The cat."),
    Pair((("user", "What?"), ("assistant", "The mat."), ("user", "And the cat?")), (), " It sits.", " It is on the mat."),
    Pair((("user", "two"),), (), " The image.", " a"),
]
"""Answers begin with a space: these trainers tokenise prompt and answer in one piece, where a letter would join the space that
the prompt ends with."""


class ResponseORPO(ORPOTrainer):
    """ORPOTrainer with CPOTrainer's likelihood term, which leaves prompts out as ours does."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        *others, chosen_logits, rejected_logits, _ = super().concatenated_forward(model, batch)
        length = batch["chosen_labels"].shape[1]
        nll = F.cross_entropy(chosen_logits[:, : length - 1].flatten(0, 1), batch["chosen_labels"][:, 1:].flatten())
        return (*others, chosen_logits, rejected_logits, nll)


def make_text_trainer(kind: type, config: type, folder: Path, output: Path, **settings: Any) -> Any:
    model = plain_model(folder)
    answers = [{s: [{"role": "assistant", "content": getattr(p, s)}] for s in ("chosen", "rejected")} for p in TEXTS]
    for answer in answers:
        for messages in answer.values():
            messages[0]["content"] = [{"type": "text", "text": messages[0]["content"]}]
    examples = [{"prompt": trl_prompt(pair), **answer} for pair, answer in zip(TEXTS, answers, strict=True)]
    return kind(
        model=model,
        args=config(**{**trl_settings(output, batch_size=len(TEXTS)), "max_length": 512, **settings}),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora_of(model),
    )


def text_batch(trainer: Any) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXTS))])


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (CPO(beta=0.2, cpo_alpha=0.3, label_smoothing=0.1), {"beta": 0.2, "cpo_alpha": 0.3, "label_smoothing": 0.1}),
        (SimPO(), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0}),
        (SimPO(cpo_alpha=0.0), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
        (ORPO(beta=0.5), {"beta": 0.5}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_of_cpo_simpo_and_orpo_are_trls_on_text(
    llava_next: Path, tmp_path: Path, algorithm: Algorithm, settings: dict[str, Any], record_difference: RecordDifference
) -> None:
    kinds = (ResponseORPO, ORPOConfig) if isinstance(algorithm, ORPO) else (CPOTrainer, CPOConfig)
    trainer = make_text_trainer(*kinds, llava_next, tmp_path, **settings)
    policy = make_policy(llava_next, needs=algorithm.needs)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(llava_next, TEXTS)
    batch = text_batch(trainer)
    for i, pair in enumerate(encoded):
        assert (
            batch["chosen_input_ids"][i][batch["chosen_attention_mask"][i] == 1].tolist() == pair.prompt_ids + pair.chosen_ids
        )
        assert batch["rejected_labels"][i][batch["rejected_labels"][i] >= 0].tolist() == pair.rejected_ids

    expected = trl_step(trainer, [batch])

    for cut in CUTS.values():
        found = assert_same(ours(llava_next, policy, algorithm, encoded, cut), expected)
        record_difference(f"{algorithm.name}, whole model", TRL, **found)


def test_trls_own_orpo_counts_the_prompts_in_its_nll(llava_next: Path, tmp_path: Path) -> None:
    trainer = make_text_trainer(ORPOTrainer, ORPOConfig, llava_next, tmp_path / "one")
    without = make_text_trainer(ResponseORPO, ORPOConfig, llava_next, tmp_path / "other")
    losses = [trl_step(one, [text_batch(one)])[0] for one in (trainer, without)]
    assert abs(losses[0] - losses[1]) > 0.01
