"""Pretrained weights: a language model that knows things, a tower that sees, and DPO on the model made of both."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from rayalign.config.sections import ModelConfig
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import resolve_model
from tests.cluster import Cluster
from tests.real.shapes import write_pairs
from tests.real.towers import EFFICIENTNET_PIXELS, image_classifier, language_model
from tests.real.wheels import EASY_VQA, unpacked
from tests.tiny_models import encode_pair, make_batch, make_policy

pytestmark = pytest.mark.slow

STEPS = 10
PAIRS = 16 * STEPS
HELD_OUT = 32
BETA = 0.1
SETTINGS = (
    *("--num_workers", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", STEPS, "--beta", BETA),
    *("--rpo_alpha", 0, "--learning_rate", 5e-4, "--lora_target_modules", "ALL", "--gradient_checkpointing", "false"),
    *("--logging_steps", 1, "--eval_steps", 5, "--save_steps", STEPS),
)
"""Steps of 16 pairs, one epoch; without the NLL term, so that the loss begins at log 2."""
LOG_2 = 0.693147
RUN_SECONDS = 900
"""Many times what two idle cores need: other tests may be running."""

# float32 through 30 layers, in rows of another shape; a log-prob sums about eight tokens.
FLOAT32 = 1e-4


@dataclass(frozen=True)
class Run:
    """A finished run, the held-out rows, and the metrics of its steps and of its passes over these rows."""

    folder: Path
    rows: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        return self.folder / "model"


@pytest.fixture(scope="module")
def run(cluster: Cluster, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real")
    training = write_pairs(folder / "train.jsonl", "train", PAIRS, seed=1)
    held_out = write_pairs(folder / "held_out.jsonl", "test", HELD_OUT, seed=2)
    data = ("--dataset", training, "--val_dataset", held_out, "--image_root", unpacked(EASY_VQA))
    process = cluster.start("pipelines/dpo.py", "--model", vlm, *data, "--output_dir", folder / "run", *SETTINGS)
    output, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output[-5000:]
    lines = _json_lines(folder / "run" / "metrics.jsonl")
    return Run(
        folder / "run",
        _json_lines(held_out),
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "eval_loss" in line],
    )


@pytest.fixture(scope="module")
def model(run: Run, vlm: Path) -> Any:
    """The base model with the run's adapter, loaded as peft and transformers document it."""
    base = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run.adapter).eval()


@pytest.fixture(scope="module")
def logps(run: Run, model: Any) -> Tensor:
    """[held-out pairs, chosen and rejected] after the run."""
    return _plain_logps(model, run)


@pytest.fixture(scope="module")
def logps_before(run: Run, model: Any) -> Tensor:
    with model.disable_adapter():
        return _plain_logps(model, run)


def test_the_language_model_knows_the_capital_of_france() -> None:
    model, tokenizer = language_model()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("12345 cats") == ["1", "2", "3", "4", "5", "Ġcats"]


def test_the_vision_tower_tells_a_palace_from_a_flower() -> None:
    model = image_classifier()
    process = CLIPImageProcessorPil(size={"shortest_edge": 224}, **EFFICIENTNET_PIXELS)
    # A pavilion of the Summer Palace, and a dahlia, for which ImageNet has no class nearer than the daisy.
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.no_grad():
        logits = model(**process(photos, return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == [698, 985]  # palace, daisy


def test_the_assembled_model_is_the_two_published_ones_and_a_projector(vlm: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    language, _ = language_model()
    published = {f"model.language_model.{name}": tensor for name, tensor in language.model.state_dict().items()}
    published |= {f"model.vision_tower.{name}": tensor for name, tensor in image_classifier().efficientnet.state_dict().items()}
    weights = model.state_dict()
    for name, tensor in published.items():
        kept = weights[name][: len(tensor)] if tensor.ndim else weights[name]  # there is one more token
        assert torch.equal(kept, tensor.bfloat16().float() if tensor.is_floating_point() else tensor), name
    others = {name for name in weights if name not in published and "projector" not in name}
    assert others == {"lm_head.weight"}


def test_the_loss_falls_from_log_2(run: Run, record_property: Callable[[str, object], None]) -> None:
    losses = [line["loss"] for line in run.steps]
    record_property("loss", " ".join(f"{loss:.3f}" for loss in losses))
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        record_property(name, " ".join(f"{line[name]:.3f}" for line in run.evaluations))
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(LOG_2, abs=1e-6)
    assert sum(losses[-3:]) / 3 < 0.4
    first, last = run.evaluations  # after 5 steps and after 10
    assert LOG_2 > first["eval_loss"] > last["eval_loss"]
    assert last["eval_loss"] < 0.45
    assert last["eval_rewards/accuracies"] >= first["eval_rewards/accuracies"] > 0.7


def test_held_out_pairs_are_told_apart_better_than_before_and_by_their_pictures(
    run: Run, model: Any, logps: Tensor, logps_before: Tensor, record_property: Callable[[str, object], None]
) -> None:
    swapped = _plain_logps(model, run, pictures=[row["images"][0] for row in run.rows[2:] + run.rows[:2]])
    before, after, by_others = (float((pairs[:, 0] > pairs[:, 1]).float().mean()) for pairs in (logps_before, logps, swapped))
    record_property("preference accuracy", f"{before:.3f} before, {after:.3f} after, {by_others:.3f} with pictures swapped")
    assert after > before + 0.05
    assert after > 0.85
    assert by_others < 0.7


def test_the_adapter_gives_the_runs_own_figures_in_transformers_and_peft(run: Run, logps: Tensor, logps_before: Tensor) -> None:
    last = run.evaluations[-1]
    rewards = BETA * (logps - logps_before)
    found = {
        "eval_logps/chosen": logps[:, 0].mean(),
        "eval_logps/rejected": logps[:, 1].mean(),
        "eval_rewards/chosen": rewards[:, 0].mean(),
        "eval_rewards/rejected": rewards[:, 1].mean(),
        "eval_rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float().mean(),
        "eval_loss": torch.nn.functional.softplus(rewards[:, 1] - rewards[:, 0]).mean(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: last[name] for name in found}, rel=1e-3
    )


def test_the_adapter_gives_the_same_log_probs_when_it_is_continued_from(run: Run, logps: Tensor, vlm: Path) -> None:
    policy = make_policy(resolve_model(ModelConfig(model=str(run.adapter)), REGISTERED_MODELS))
    for start in range(0, HELD_OUT, 8):
        pairs = [
            encode_pair(
                vlm,
                str(i),
                row["query"].removeprefix("<image>"),
                row["response"],
                row["rejected_response"],
                images=[Path(row["images"][0]).read_bytes()],
            )
            for i, row in enumerate(run.rows[start : start + 8])
        ]
        batch = make_batch(vlm, pairs)
        with torch.no_grad():
            ours = policy.logps(batch, policy.image_features(batch))
        both = torch.stack([ours.chosen.total, ours.rejected.total], dim=1)
        torch.testing.assert_close(both, logps[start : start + 8], atol=0, rtol=FLOAT32)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def _plain_logps(model: Any, run: Run, *, pictures: Sequence[str] | None = None) -> Tensor:
    """[pairs, chosen and rejected], each response in a row of its own, by the model's own forward and its processor."""
    processor = AutoProcessor.from_pretrained(run.adapter)
    results = []
    for row, picture in zip(run.rows, pictures or [row["images"][0] for row in run.rows], strict=True):
        question = [{"type": "image"}, {"type": "text", "text": row["query"].removeprefix("<image>")}]
        prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        image = Image.open(picture).convert("RGB")
        length = len(processor(text=[prompt], images=[image])["input_ids"][0])
        for answer in (row["response"], row["rejected_response"]):
            inputs = processor(text=[f"{prompt}{answer}<|im_end|>\n"], images=[image], return_tensors="pt")
            ids = inputs["input_ids"][0, length:]
            logits = model(**inputs).logits[0, length - 1 : -1]
            results.append(logits.log_softmax(-1).gather(1, ids[:, None]).sum())
    return torch.stack(results).view(-1, 2)
