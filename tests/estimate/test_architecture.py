"""The estimate's model without weights is the one that is trained: prepared by the same function, to the same end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.estimate.architecture import Blueprint
from rayalign.models.registry import load_config
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from tests.tiny_models import make_policy

ALL: Any = ("ALL",)
VALUE = Needs(head="value", dropout=False)
CASES = {
    "LoRA": (TunerConfig(lora_dropout=0.1), Needs(reference=True, dropout=True)),
    "LoRA on all parts, without dropout": (
        TunerConfig(lora_target_modules=ALL, freeze_vit=False, lora_dropout=0.1),
        Needs(dropout=False),
    ),
    "DoRA": (TunerConfig(use_dora=True), Needs()),
    "full": (TunerConfig(sft_type="full"), Needs(dropout=True)),
    "full, all parts": (TunerConfig(sft_type="full", freeze_vit=False, freeze_aligner=False), Needs(dropout=False)),
    "full with a value head": (TunerConfig(sft_type="full"), VALUE),
    "LoRA with a value head": (TunerConfig(), VALUE),
}
DROPOUT = {"attention_dropout": 0.1}
"""In the language model, so that what turns it off has something to do."""


def described(model: nn.Module) -> dict[str, Any]:
    """All of a model that decides on what its training computes, but for its weights."""
    described: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {"type": type(module).__qualname__, "training": module.training, "repr": module.extra_repr()}
        for setting in ("p", "attention_dropout", "gradient_checkpointing"):
            value = getattr(module, setting, None)
            own |= {setting: value} if isinstance(value, (bool, float)) else {}
        described[f"module {name}"] = own
    for name, parameter in model.named_parameters(remove_duplicate=False):
        described[f"parameter {name}"] = (parameter.dtype, tuple(parameter.shape), parameter.requires_grad)
    for name, buffer in model.named_buffers():
        described[f"buffer {name}"] = (buffer.dtype, tuple(buffer.shape))
    return described


def settings_of(base: Any) -> dict[str, Any]:
    """A model's config as it is after loading, with the kernels that attention uses, and without where it came from."""
    config = base.config
    parts = {"": config, "text": config.get_text_config(), "vision": getattr(config, "vision_config", None)}
    kernels = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {**{name: value for name, value in config.to_dict().items() if name != "_name_or_path"}, "kernels": kernels}


def assert_same(folder: Path, tuner: TunerConfig, needs: Needs, model: ModelConfig, adapter: str | None = None) -> None:
    source = ModelSource(str(folder), adapter)
    trained = make_policy(source, model=model, tuner=tuner, needs=needs)
    skeleton = Blueprint(load_config(str(folder)), source, model, tuner, needs).build()
    expected, found = described(trained.model), described(skeleton.model)
    assert found.keys() == expected.keys()
    assert {name: value for name, value in found.items() if value != expected[name]} == {}
    assert settings_of(skeleton.base) == settings_of(trained.base)
    names = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
    of_head = {"v_head.summary.weight"} if needs.head == "value" else set()
    assert {names[id(parameter)] for parameter in skeleton.trainable} | of_head == set(trained.trainable)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, case) for family in ("llava", "llava_next", "qwen2_vl", "internvl", "gemma3", "idefics3") for case in CASES),
        *(("llama", case) for case in ("LoRA", "DoRA", "full", "full with a value head")),
    ],
)
def test_the_model_of_the_estimate_is_the_one_that_is_trained(
    model_folder: Callable[..., Path], family: str, case: str
) -> None:
    tuner, needs = CASES[case]
    folder = model_folder(family, **DROPOUT)
    for dtype, checkpointing in (("float32", True), ("bfloat16", False)):
        model = ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]  # of the two
        assert_same(folder, tuner, needs, model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_has_the_same_attention_kernel(model_folder: Callable[..., Path], attention: Any) -> None:
    assert_same(model_folder("llava"), TunerConfig(), Needs(), ModelConfig(attn_implementation=attention, dtype="float32"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (TunerConfig(), "continued"),
        (TunerConfig(), "stacked"),
        (TunerConfig(), "merged"),
        (TunerConfig(use_dora=True), "continued"),
        (TunerConfig(use_dora=True), "merged"),
    ],
)
def test_it_starts_from_an_adapter_as_the_training_does(
    model_folder: Callable[..., Path], tmp_path: Path, first: TunerConfig, then: str
) -> None:
    folder = model_folder("llava")
    save_policy(make_policy(folder, tuner=first), tmp_path)
    tuner = {
        "continued": TunerConfig(),
        "stacked": TunerConfig(stack_adapter=True, lora_rank=2, lora_target_modules=ALL),
        "merged": TunerConfig(sft_type="full"),
    }[then]
    assert_same(folder, tuner, Needs(reference=True), ModelConfig(dtype="bfloat16"), str(tmp_path))


def test_dropout_is_off_for_an_algorithm_that_trains_without(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava", **DROPOUT)
    for dropout, expected in ((True, 0.1), (False, 0.0)):
        needs, source = Needs(dropout=dropout), ModelSource(str(folder))
        skeleton = Blueprint(load_config(str(folder)), source, ModelConfig(), TunerConfig(), needs).build()
        rates = {
            module.attention_dropout
            for name, module in skeleton.base.get_decoder().named_modules()
            if name.endswith("self_attn")
        }
        assert rates == {expected}


def test_weights_on_the_meta_device_take_no_memory(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    model = Blueprint(load_config(str(folder)), ModelSource(str(folder)), ModelConfig(), TunerConfig(), Needs()).build().model
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
