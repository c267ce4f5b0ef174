import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from rayalign.ops.lora_linear import FusedLoraLinear
from rayalign.policy.compat import fuse_lora_linears, set_active_adapters

# Two products and a sum of float64 in another order.
FLOAT64 = 1e-13


def adapted(*, bias: bool = True, dtype: torch.dtype = torch.float64, fused: bool = True, **lora: Any) -> Any:
    """A linear of 6 inputs and 5 outputs under LoRA of rank 2 with all weights drawn, the same each time."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **{"lora_dropout": 0.0, **lora})
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=dtype)),  # type: ignore[arg-type]  # any module will do
        fuse_lora_linears(config) if fused else config,
        autocast_adapter_dtype=dtype != torch.float64,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert (type(layer_of(model)) is FusedLoraLinear) == fused
    return model


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """What the model makes of x, and the gradients of x and of all trainable weights."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # for dropout
    y = model(x)
    trainable = [p for p in model.parameters() if p.requires_grad]
    grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trainable], grad_output)]


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    ours, theirs = (outputs(adapted(bias=bias, fused=fused), x) for fused in (True, False))
    assert len(ours) == 4  # y, x, A, B
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=FLOAT64, rtol=FLOAT64)


def test_gradcheck() -> None:
    layer = layer_of(adapted())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A.default.weight": a, "lora_B.default.weight": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, a.detach().requires_grad_(), b.detach().requires_grad_()))


def test_no_tensor_is_made_but_the_products() -> None:
    """The output, its narrow part, and in bfloat16 two small copies of the adapter."""
    model = adapted(dtype=torch.bfloat16)
    assert layer_of(model).lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    names: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = model(x)
    names = [event.name for event in profile.events() or []]
    assert y.dtype == torch.bfloat16
    assert not {"aten::mul", "aten::add"} & set(names)
    assert names.count("aten::addmm_") == 1
    assert names.count("aten::_to_copy") == 2


def test_bfloat16_is_near_float32() -> None:
    exact = outputs(adapted(dtype=torch.float64), x := torch.randn(64, 6, dtype=torch.float64))
    torch.manual_seed(0)
    rounded = adapted(dtype=torch.bfloat16)
    with torch.no_grad():  # the same numbers, but for their rounding
        for (name, parameter), (other, value) in zip(rounded.named_parameters(), adapted().named_parameters(), strict=True):
            assert name == other
            parameter.copy_(value)
    for a, b in zip(outputs(rounded, x.bfloat16()), exact, strict=True):
        # Three digits of each factor, and of the sums over 64 rows.
        assert float((a.double() - b).abs().max()) < 0.03 * float(b.abs().max())


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_the_formula_leaves_out_is_computed_by_peft(lora: dict[str, Any]) -> None:
    x = torch.randn(7, 6, dtype=torch.float64)
    ours, theirs = (outputs(adapted(fused=fused, **lora), x) for fused in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    plain = outputs(adapted(), x)
    assert not torch.allclose(ours[0], plain[0])


def test_dropout_is_left_out_in_evaluation() -> None:
    x = torch.randn(7, 6, dtype=torch.float64)
    dropping, plain = adapted(lora_dropout=0.5).eval(), adapted().eval()
    assert torch.equal(dropping(x), plain(x))


def test_without_an_active_adapter_the_layer_is_the_frozen_one() -> None:
    model = adapted()
    layer, x = layer_of(model), torch.randn(7, 6, dtype=torch.float64)
    expected = layer.get_base_layer()(x)
    assert not torch.allclose(model(x), expected)
    set_active_adapters(layer, [])
    assert torch.equal(model(x), expected)
    set_active_adapters(layer, ["default"])
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_active_adapters_add_up_as_in_peft() -> None:
    x, found = torch.randn(7, 6, dtype=torch.float64), []
    for fused in (True, False):
        model = adapted(fused=fused)
        torch.manual_seed(3)
        model.add_adapter("frozen", LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
        model.to(torch.float64)
        layer = layer_of(model)
        set_active_adapters(layer, ["frozen", "default"])
        assert not layer.lora_A["frozen"].weight.requires_grad
        found.append(outputs(model, x))
    assert len(found[0]) == 4
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FLOAT64, rtol=FLOAT64)
    assert not torch.allclose(found[0][0], outputs(adapted(), x)[0])


def test_a_merged_layer_and_a_merged_model_are_what_peft_makes_of_them() -> None:
    model, x = adapted(), torch.randn(7, 6, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=FLOAT64, rtol=FLOAT64)


def test_layers_of_other_kinds_stay_those_of_peft() -> None:
    class Quantised(nn.Linear):
        """A linear to peft's isinstance, as bitsandbytes' are."""

    config = fuse_lora_linears(LoraConfig(r=2, target_modules=["0", "1", "2"]))
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Conv1d(5, 5, 1), Quantised(5, 5)),  # type: ignore[arg-type]
        config,
    )
    layers = model.base_model.model
    assert [type(layer).__name__ for layer in layers] == ["FusedLoraLinear", "Conv1d", "Linear"]
    assert isinstance(layers[0], PeftLinear)


def test_the_layer_is_named_in_no_saved_config(tmp_path: Path) -> None:
    written = []
    for fused in (True, False):
        adapted(fused=fused).save_pretrained(tmp_path / str(fused))
        written.append((tmp_path / str(fused) / "adapter_config.json").read_text())
    assert written[0] == written[1]


def test_a_fused_layer_pickles() -> None:
    x = torch.randn(7, 6, dtype=torch.float64)
    model = adapted()
    assert torch.equal(pickle.loads(pickle.dumps(layer_of(model)))(x), model(x))
