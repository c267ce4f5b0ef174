"""The private names that rayalign relies on, so that a release of a library that changes one is noticed here first.

A test whose name says that a workaround is still needed fails when the workaround can go.
"""

import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.masking_utils import sdpa_mask

from rayalign.ops.attention import SHARED_PREFIX
from rayalign.ops.lora_linear import FusedLoraLinear
from rayalign.policy import compat
from tests.tiny_models import make_model


def adapted(**lora: Any) -> Any:
    """A linear with two adapters, the first of them trainable, all with drawn weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **lora)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)  # type: ignore[arg-type]  # any module will do
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return model


# peft


def test_adapters_are_switched_without_a_change_of_what_is_trainable() -> None:
    model, x = adapted(), torch.randn(3, 6)
    layer = model.base_model.model[0]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2
    assert not any("other" in name for name in trainable)
    outputs = []
    for names in ([], ["default"], ["other"], ["other", "default"]):
        compat.set_active_adapters(layer, names)
        assert list(layer.active_adapters) == names
        outputs.append(model(x))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    frozen, first, second, both = outputs
    assert torch.equal(frozen, layer.get_base_layer()(x))
    assert (first - frozen).abs().min() > 0
    torch.testing.assert_close(both - frozen, (first - frozen) + (second - frozen))


def test_pefts_own_switch_still_changes_what_is_trainable() -> None:
    model = adapted()
    model.set_adapter("other")
    assert all("other" in name for name, p in model.named_parameters() if p.requires_grad)


def test_names_under_peft_are_those_of_the_base_model() -> None:
    model = adapted()
    named = {compat.name_in_base(name) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert named == {"0"}


def test_peft_makes_fused_layers_and_forgets_that_when_it_saves(tmp_path: Path) -> None:
    config = compat.fuse_lora_linears(LoraConfig(r=2, target_modules=["0"]))
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)  # type: ignore[arg-type]  # any module will do
    assert type(model.base_model.model[0]) is FusedLoraLinear
    model.save_pretrained(str(tmp_path))
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), str(tmp_path))  # type: ignore[arg-type]
    assert type(again.base_model.model[0]) is not FusedLoraLinear
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_a_dora_magnitude_that_peft_computes_still_has_the_rounding_of_the_weights() -> None:
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 5, dtype=torch.bfloat16)), config)  # type: ignore[arg-type]
    layer: Any = model.base_model.model[0]
    exact = layer.get_base_layer().weight.float().norm(dim=1)
    assert not torch.equal(layer.lora_magnitude_vector["default"].weight, exact)
    compat.recompute_dora_magnitude(layer, "default")
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude, exact)


def test_peft_still_asks_for_gradient_checkpointing_by_its_old_name() -> None:
    model, config = make_model("llava"), LoraConfig(target_modules=["q_proj"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    assert any("`is_gradient_checkpointing` is deprecated" in str(warning.message) for warning in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compat.without_peft_warnings():
            get_peft_model(make_model("llava"), config)


def test_an_adapter_for_the_meta_device_still_makes_peft_read_its_weights(tmp_path: Path) -> None:
    get_peft_model(make_model("llava"), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))

    def load() -> None:
        with torch.device("meta"):
            PeftModel.from_pretrained(AutoModelForImageTextToText.from_config(make_model("llava").config), str(tmp_path))

    with pytest.warns(UserWarning, match="copying from a non-meta parameter"):
        load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compat.without_peft_warnings():
            load()


# transformers


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_attention_kernel_of_a_decoder_is_the_one_that_was_set(kernel: str) -> None:
    model = make_model("llava")
    model.set_attn_implementation({"text_config": kernel})
    assert compat.attention_kernel(model.get_decoder()) == kernel


def test_transformers_knows_the_kernel_by_its_name() -> None:
    compat.register_shared_prefix()
    assert AttentionInterface()[SHARED_PREFIX] is compat.shared_prefix_kernel
    assert AttentionMaskInterface()[SHARED_PREFIX] is sdpa_mask
    model = make_model("llava")
    model.set_attn_implementation({"text_config": SHARED_PREFIX})
    assert compat.attention_kernel(model.get_decoder()) == SHARED_PREFIX


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_without_row_lengths_the_kernel_is_plain_attention(kv_heads: int) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=4 // kv_heads, is_causal=True)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, kv_heads, kv_heads))
    output, weights = compat.shared_prefix_kernel(module, query, key, value, None)
    assert weights is None
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_the_inner_model_still_names_image_arguments_that_the_outer_one_hands_on() -> None:
    model = make_model("llava_next")
    assert {"pixel_values", "image_sizes"} <= compat.image_arguments(model)
    unnamed = [
        family
        for family in ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "idefics3", "gemma3")
        if compat.image_arguments(model := make_model(family)) - set(inspect.signature(model.get_image_features).parameters)
    ]
    assert unnamed


def test_weights_are_saved_under_the_names_they_had_on_disk(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(model_folder("llava"))
    assert loaded._weight_conversions
    made = SimpleNamespace()
    compat.keep_weight_names(made, loaded)
    assert made._weight_conversions is loaded._weight_conversions


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # in its import
def test_a_skeleton_gets_the_layers_of_a_model_that_is_loaded_in_4_bits(model_folder: Callable[..., Path]) -> None:
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "vision_tower"])
    loaded = AutoModelForImageTextToText.from_pretrained(
        model_folder("llava"), quantization_config=in_4_bits, device_map={"": "cpu"}
    )
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(loaded.config)
        compat.quantise_skeleton(skeleton, in_4_bits)
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (skeleton, loaded)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds[0].values())) > 5
    for mark in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(skeleton, mark) == getattr(loaded, mark)


# torch


def test_fake_tensors_have_a_storage_without_memory() -> None:
    with compat.fake_tensors():
        tensor = torch.empty(2**40, dtype=torch.uint8)  # a terabyte
        view = tensor.view(2, -1)
        other = torch.empty(1)
    assert tensor.untyped_storage().nbytes() == 2**40
    assert compat.storage_key(view) == compat.storage_key(tensor)
    assert compat.storage_key(other) != compat.storage_key(tensor)


def test_tensors_of_one_storage_have_one_key() -> None:
    tensor: Tensor = torch.zeros(4, 3)
    assert compat.storage_key(tensor[1:]) == compat.storage_key(tensor.t()) == compat.storage_key(tensor)
    assert compat.storage_key(tensor.clone()) != compat.storage_key(tensor)
