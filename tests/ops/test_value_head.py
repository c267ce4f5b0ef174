"""The value head of a reward model: its file, and the scores it gives at the last token of each response."""

import dataclasses
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor

from rayalign.algorithms import RM
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import open_image
from rayalign.models.source import ModelSource
from rayalign.ops.value_head import ValueHead, load_value_head, save_value_head
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from tests.tiny_models import FAMILIES, counts_of, encode_pair, in_float64, make_batch, make_policy, noise_image, wake_adapters

# float64 sums of the same few hundred terms in another order, through two layers and back.
FLOAT64 = 1e-10

NEEDS = RM().needs
SIZE = 64  # of the tiny models' states


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava_next")


def pairs_of(folder: Path) -> list[EncodedPair]:
    """Three pairs of different lengths with 1, 0 and 2 images; the last one's chosen response is a single token."""
    red, blue = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
    pairs = [
        encode_pair(folder, "one", "Which digit is it?", "The digit is two.", "a cat", images=[red]),
        encode_pair(folder, "none", "two?", "A cat sits on the mat.", "yes"),
        encode_pair(folder, "two", "describe the image.", "It", "The digit is two, the cat sits.", images=[blue, red]),
    ]
    return [*pairs[:2], dataclasses.replace(pairs[2], chosen_ids=pairs[2].chosen_ids[:1])]


def reward_model(folder: Path | ModelSource, sft_type: Any = "lora", **model: Any) -> Policy:
    """A reward model whose trained weights all matter."""
    config = ModelConfig(**{"gradient_checkpointing": False, **model})
    return wake_adapters(make_policy(folder, needs=NEEDS, tuner=TunerConfig(sft_type=sft_type), model=config))


def result_of(folder: Path, run: Path, sft_type: str) -> ModelSource:
    """Where a run's model is found again."""
    return ModelSource(str(run)) if sft_type == "full" else ModelSource(str(folder), adapter=str(run))


def scores(policy: Policy, batch: PairBatch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return policy.values(batch, policy.image_features(batch))


def plain_scores(policy: Policy, folder: Path, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """The same by the model as transformers runs it: each `[prompt | response]` a row of its own, scored at its last token."""
    assert policy.value_head is not None
    process = AutoProcessor.from_pretrained(folder).image_processor
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        ends = []
        for pair in pairs:
            images = dict(process([open_image(i) for i in pair.images], return_tensors="pt")) if pair.images else {}
            if images:
                images["pixel_values"] = images["pixel_values"].to(policy.base.dtype)
            ids = torch.tensor([[*pair.prompt_ids, *getattr(pair, side)]])
            ends.append(policy.base.model(input_ids=ids, use_cache=False, **images).last_hidden_state[0, -1])
        sides.append(policy.value_head(torch.stack(ends)))
    return sides[0], sides[1]


def loss_and_gradients(policy: Policy, values: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = -F.logsigmoid(values[0] - values[1]).sum() + 0.1 * ((values[0] + values[1]) ** 2).sum()
    return loss.detach(), list(torch.autograd.grad(loss, list(policy.trainable.values())))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_rows_at_their_last_token_in_loss_and_gradient(
    model_folder: Callable[..., Path], family: str, checkpointing: bool
) -> None:
    folder = model_folder(family)
    pairs = pairs_of(folder)
    policy = in_float64(reward_model(folder, gradient_checkpointing=checkpointing))
    batch = make_batch(folder, pairs)
    ours = loss_and_gradients(policy, policy.values(batch, policy.image_features(batch)))
    plain = loss_and_gradients(policy, plain_scores(policy, folder, pairs))
    torch.testing.assert_close(ours[0], plain[0], atol=0, rtol=FLOAT64)
    largest = max(float(gradient.abs().max()) for gradient in plain[1])
    assert largest > 1e-3
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, atol=FLOAT64 * largest, rtol=0)


@pytest.mark.parametrize("fault", ["a token too early", "the other response", "the prompt's end"])
def test_a_score_read_elsewhere_is_told_from_that_of_the_last_token(folder: Path, fault: str) -> None:
    pairs = pairs_of(folder)
    policy = in_float64(reward_model(folder))
    batch = make_batch(folder, pairs)
    if fault == "a token too early":
        read_at = batch.last_token - 1
    elif fault == "the other response":
        read_at = batch.last_token.roll(len(pairs))
    else:
        row = torch.arange(len(pairs)) * batch.input_ids.shape[1]
        read_at = (row + torch.tensor([len(p.prompt_ids) - 1 for p in pairs])).repeat(2)
    wrong = torch.cat(scores(policy, dataclasses.replace(batch, last_token=read_at)))
    with torch.no_grad():
        right = torch.cat(plain_scores(policy, folder, pairs))
    assert (wrong - right).abs().min() > 1e-3  # each of the six


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sft_type", ["lora", "full"])
def test_the_file_beside_the_weights_holds_the_head_and_gives_the_same_scores_again(
    folder: Path, tmp_path: Path, sft_type: str, safe: bool
) -> None:
    policy = reward_model(folder, sft_type)
    save_policy(policy, tmp_path, safe_serialization=safe)
    assert (tmp_path / ("adapter_model.safetensors" if sft_type == "lora" else "model.safetensors")).is_file()
    assert [f.name for f in tmp_path.glob("value_head.*")] == [f"value_head.{'safetensors' if safe else 'bin'}"]
    path = next(tmp_path.glob("value_head.*"))
    weights = load_file(path) if safe else torch.load(path, weights_only=True)
    assert {name: (tuple(w.shape), w.dtype) for name, w in weights.items()} == {
        "v_head.summary.weight": ((1, SIZE), torch.float32),
        "v_head.summary.bias": ((1,), torch.float32),
    }
    again = make_policy(result_of(folder, tmp_path, sft_type), needs=NEEDS, tuner=TunerConfig(sft_type=sft_type))
    batch = make_batch(folder, pairs_of(folder))
    for before, after in zip(scores(policy, batch), scores(again, batch), strict=True):
        assert torch.equal(before, after)
        assert before.unique().numel() == 3


def test_training_continues_from_the_head_beside_the_adapter(folder: Path, tmp_path: Path) -> None:
    policy = reward_model(folder)
    save_policy(policy, tmp_path)
    continued = make_policy(ModelSource(str(folder), adapter=str(tmp_path)), needs=NEEDS)
    assert policy.value_head is not None
    assert continued.value_head is not None
    start = continued.value_head.summary.weight.detach().clone()
    assert torch.equal(start, policy.value_head.summary.weight)
    pairs = pairs_of(folder)
    trainer = Trainer(continued, RM(), OptimizerConfig(learning_rate=1e-3, warmup_ratio=0), num_steps=2)
    trainer.step(0, [make_batch(folder, pairs)], counts_of(pairs))
    moved = continued.value_head.summary.weight - start
    # AdamW's first step moves each weight by the learning rate, and by the decay of 1e-3 * 0.1 of weights near 0.1.
    assert 5e-4 < moved.abs().max() < 1.1e-3


def test_training_from_an_adapter_without_a_head_starts_with_scores_of_zero(folder: Path, tmp_path: Path) -> None:
    save_policy(wake_adapters(make_policy(folder)), tmp_path)
    policy = make_policy(ModelSource(str(folder), adapter=str(tmp_path)), needs=NEEDS)
    assert torch.cat(scores(policy, make_batch(folder, pairs_of(folder)))).tolist() == [0.0] * 6


def trained_names(policy: Policy) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in policy.trainable}


def test_a_lora_reward_model_trains_its_adapters_and_the_heads_weight(folder: Path) -> None:
    projections = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
    adapters = {f"{name}.lora_{side}.default.weight" for name in projections for side in "AB"}
    assert trained_names(reward_model(folder)) == adapters | {"v_head.summary.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_reward_model_trains_the_output_head_only_where_it_is_the_input_embedding(
    model_folder: Callable[..., Path], tied: bool
) -> None:
    policy = reward_model(model_folder("llava", tie_word_embeddings=tied), "full")
    language_model = {f"model.language_model.{name}" for name, _ in policy.base.get_decoder().named_parameters()}
    assert trained_names(policy) == language_model | {"v_head.summary.weight"}
    head, embedding = policy.base.get_output_embeddings().weight, policy.base.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert head.requires_grad == tied


def test_the_head_is_float32_and_scores_in_float32_when_the_model_is_bfloat16(folder: Path) -> None:
    policy = reward_model(folder, dtype="bfloat16")
    head = policy.value_head
    assert head is not None
    assert (policy.base.dtype, head.summary.weight.dtype) == (torch.bfloat16, torch.float32)
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    values = torch.cat(scores(policy, make_batch(folder, pairs_of(folder))))
    (states,) = seen
    assert (states.dtype, values.dtype) == (torch.bfloat16, torch.float32)
    exact = states.double() @ head.summary.weight[0].double()
    # float32 sums of 64 products near 1; bfloat16 keeps 8 bits of the result.
    torch.testing.assert_close(values.double(), exact, atol=1e-5, rtol=0)
    in_bfloat16 = states @ head.summary.weight[0].bfloat16()
    assert (in_bfloat16.double() - exact).abs().max() > 1e-3


def test_a_head_from_elsewhere_keeps_its_bias_and_its_bias_does_not_learn(folder: Path, tmp_path: Path) -> None:
    save_policy(reward_model(folder), tmp_path)
    weights = load_file(tmp_path / "value_head.safetensors")
    source = ModelSource(str(folder), adapter=str(tmp_path))
    pairs = pairs_of(folder)
    batch = make_batch(folder, pairs)
    without = torch.cat(scores(make_policy(source, needs=NEEDS), batch))
    save_file({**weights, "v_head.summary.bias": torch.tensor([0.75])}, tmp_path / "value_head.safetensors")
    policy = make_policy(source, needs=NEEDS)
    # One float32 addition to numbers below 8.
    torch.testing.assert_close(torch.cat(scores(policy, batch)), without + 0.75, atol=1e-6, rtol=0)
    Trainer(policy, RM(), OptimizerConfig(warmup_ratio=0), num_steps=2).step(0, [batch], counts_of(pairs))
    save_policy(policy, tmp_path)
    assert load_file(tmp_path / "value_head.safetensors")["v_head.summary.bias"].tolist() == [0.75]


WEIGHT, BIAS = torch.zeros(1, SIZE), torch.zeros(1)


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (
            {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": BIAS},
            "{'v_head.summary.bias': (1,), 'v_head.summary.weight': (1, 32)}",
        ),
        ({"v_head.summary.weight": WEIGHT}, "{'v_head.summary.weight': (1, 64)}"),
        ({"summary.weight": WEIGHT, "summary.bias": BIAS}, "{'summary.bias': (1,), 'summary.weight': (1, 64)}"),
    ],
    ids=["another size", "no bias", "other names"],
)
def test_a_head_of_another_model_is_refused(tmp_path: Path, weights: dict[str, Tensor], found: str) -> None:
    save_file(weights, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError) as caught:
        load_value_head(tmp_path, SIZE)
    assert str(caught.value) == (
        f"{tmp_path}/value_head.safetensors: holds {found}, and the value head of this model is "
        "{'v_head.summary.weight': (1, 64), 'v_head.summary.bias': (1,)}. Was it made for another model?"
    )


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sprung),)


def write_with_torch(path: Path, sprung: Path) -> None:
    torch.save({"v_head.summary.weight": WEIGHT, "v_head.summary.bias": Trap(sprung)}, path)


def write_pickle(path: Path, sprung: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))


@pytest.mark.parametrize("write", [write_with_torch, write_pickle])
def test_a_bin_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, write: Callable[[Path, Path], None]) -> None:
    path, sprung = tmp_path / "value_head.bin", tmp_path / "sprung"
    write(path, sprung)
    with pytest.raises(ValueError) as caught:
        load_value_head(tmp_path, SIZE)
    assert str(caught.value) == unreadable(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False) if write is write_with_torch else pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"{}", b"hello"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_value_head(tmp_path, SIZE)
    assert str(caught.value) == unreadable(tmp_path / name)


def test_a_bin_file_of_anything_but_named_tensors_is_refused(tmp_path: Path) -> None:
    for content in ([WEIGHT, BIAS], WEIGHT, {"v_head.summary.weight": [0.0] * SIZE, "v_head.summary.bias": [0.0]}):
        torch.save(content, tmp_path / "value_head.bin")
        with pytest.raises(ValueError) as caught:
            load_value_head(tmp_path, SIZE)
        assert str(caught.value) == unreadable(tmp_path / "value_head.bin")


def unreadable(path: Path) -> str:
    return (
        f"{path}: is damaged, or holds something else than named tensors, which is not read since it could run code. "
        "Copy the value head again from the run that wrote it."
    )


def test_a_new_head_scores_zero_and_its_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    head = load_value_head(tmp_path, SIZE)  # there is no file
    assert head(torch.randn(5, SIZE)).tolist() == [0.0] * 5
    with torch.no_grad():
        head.summary.weight.normal_()
    save_value_head(head, tmp_path, safe_serialization=True)
    again = load_value_head(tmp_path, SIZE)
    assert isinstance(again, ValueHead)
    assert torch.equal(again.summary.weight, head.summary.weight)
    assert {name: p.requires_grad for name, p in again.named_parameters()} == {"summary.weight": True, "summary.bias": False}
