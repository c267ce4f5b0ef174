from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from rayalign.training.mfu import flops_per_token, peak_tflops
from tests.tiny_models import make_policy


@pytest.mark.parametrize(
    ("card", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA L4", 121)]
)
def test_a_cards_peak_is_found_by_the_name_that_torch_gives(card: str, peak: float) -> None:
    assert peak_tflops(card) == peak


def test_an_unknown_card_has_none() -> None:
    assert peak_tflops("Radeon") is None


def test_a_token_costs_two_operations_a_weight_in_each_product(model_folder: Callable[..., Path]) -> None:
    policy = make_policy(model_folder("llava"))
    linears = [module for module in policy.base.get_decoder().modules() if isinstance(module, nn.Linear)]
    trained = sum(m.weight.numel() for m in linears if m.weight.requires_grad)
    frozen = sum(m.weight.numel() for m in linears if not m.weight.requires_grad)
    assert trained
    assert frozen > trained  # adapters beside the model's own
    assert flops_per_token(policy) == 6 * trained + 4 * frozen
