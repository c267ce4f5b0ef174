"""Policies that a process makes of one base model, loaded once, against policies whose base model is loaded for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayalign.algorithms import DPO, RM, Algorithm, SimPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.store import EncodedPair
from rayalign.models.source import ModelSource
from rayalign.policy import loading
from rayalign.policy.kept_base import KeptBase, over_same_weights
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from tests.tiny_models import counts_of, encode_pair, make_batch, make_model, noise_image

EVERYWHERE: Any = {"freeze_vit": False, "freeze_aligner": False}


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


def pairs_of(folder: Path) -> list[EncodedPair]:
    picture = noise_image(40, 30, seed=1)
    return [
        encode_pair(folder, "one", "Which digit is it?", "The digit is two.", "a cat", images=[picture]),
        encode_pair(folder, "none", "two?", "A cat sits on the mat.", "yes"),
    ]


def policy_of(
    source: ModelSource, tuner: TunerConfig, algorithm: Algorithm, kept: KeptBase | None, *, seed: int = 42, **model: Any
) -> Policy:
    return load_policy(
        source,
        model=ModelConfig(**model),
        tuner=tuner,
        device=torch.device("cpu"),
        needs=algorithm.needs,
        seed=seed,
        kept=kept,
    )


def trained(policy: Policy, algorithm: Algorithm, folder: Path) -> dict[str, Tensor]:
    """All weights after two steps, trained ones and others."""
    pairs = pairs_of(folder)
    trainer = Trainer(policy, algorithm, OptimizerConfig(learning_rate=1e-2, warmup_ratio=0), num_steps=2)
    for step in range(2):
        trainer.step(step, [make_batch(folder, pairs, needs=algorithm.needs)], counts_of(pairs))
    head = policy.value_head.state_dict() if policy.value_head is not None else {}
    return {name: weight.clone() for name, weight in {**policy.model.state_dict(), **head}.items()}


def adapter_of(folder: Path, target: Path) -> str:
    """A trained adapter whose config asks for PiSSA, which takes from the base model's weights as it begins."""
    policy = policy_of(ModelSource(str(folder)), TunerConfig(lora_rank=4), DPO(), None)
    trained(policy, DPO(), folder)
    save_policy(policy, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    return str(target)


def test_each_policy_of_a_kept_base_trains_as_one_whose_base_is_loaded_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone, adapted = ModelSource(str(folder)), ModelSource(str(folder), adapter_of(folder, tmp_path))
    settings: list[tuple[ModelSource, TunerConfig, Algorithm, dict[str, Any]]] = [
        (alone, TunerConfig(), DPO(), {}),
        (alone, TunerConfig(use_dora=True, lora_rank=4), DPO(), {"gradient_checkpointing": False}),
        (adapted, TunerConfig(), DPO(), {}),  # and a second one, which is the reference
        (alone, TunerConfig(sft_type="full", **EVERYWHERE), SimPO(), {}),  # writes into all weights
        (alone, TunerConfig(use_rslora=True, lora_dropout=0.3, lora_target_modules=("ALL",), **EVERYWHERE), DPO(), {}),
        (adapted, TunerConfig(stack_adapter=True), DPO(), {}),
        (alone, TunerConfig(), RM(), {}),
        (alone, TunerConfig(), DPO(), {"dtype": "bfloat16"}),
        (alone, TunerConfig(), DPO(), {}),
    ]
    expected = [
        trained(policy_of(source, tuner, algorithm, None, seed=seed, **model), algorithm, folder)
        for seed, (source, tuner, algorithm, model) in enumerate(settings)
    ]
    loaded: list[str] = []
    load = loading.load_weights

    def counting(auto_class: Any, model: str, **options: Any) -> Any:
        loaded.append(f"{options['dtype']} {options['needs_output_head']}")
        return load(auto_class, model, **options)

    monkeypatch.setattr(loading, "load_weights", counting)
    kept = KeptBase()
    for seed, (source, tuner, algorithm, model) in enumerate(settings):
        found = trained(policy_of(source, tuner, algorithm, kept, seed=seed, **model), algorithm, folder)
        assert found.keys() == expected[seed].keys()
        different = [name for name, weight in found.items() if not torch.equal(weight, expected[seed][name])]
        assert not different, (seed, different)
    # Once for all adapters; for all weights; without an output head; in another type; and back.
    assert loaded == [
        *("torch.float32 True", "torch.float32 True", "torch.float32 False", "torch.bfloat16 True", "torch.float32 True")
    ]


def test_a_base_whose_weights_were_written_into_is_loaded_again():
    kept, loads = KeptBase(), []

    def load() -> Any:
        loads.append(1)
        return make_model("llava")

    first = next(kept.get("llava", load).parameters()).clone()
    base = kept.get("llava", load)
    assert len(loads) == 1
    with torch.no_grad():
        next(base.parameters()).mul_(2)
    assert torch.equal(next(kept.get("llava", load).parameters()), first)
    assert len(loads) == 2
    kept.get("another", load)
    assert len(loads) == 3


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_a_copy_has_modules_of_its_own_over_the_same_memory(family: str):
    base = make_model(family)
    copied = over_same_weights(base)
    mine, theirs = dict(base.named_parameters(remove_duplicate=False)), dict(copied.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys()
    assert all(theirs[name].data_ptr() == weight.data_ptr() and theirs[name] is not weight for name, weight in mine.items())
    # What is tied stays tied.
    assert len(list(copied.parameters())) == len(list(base.parameters()))
    assert not set(map(id, base.modules())) & set(map(id, copied.modules()))
    assert copied.config is not base.config
    assert not any(weight.requires_grad for weight in theirs.values())
