"""Fused RMS norms against transformers' own arithmetic, and what is none of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayalign.config.sections import TunerConfig
from rayalign.policy.fused_norms import fuse_norms
from tests.tiny_models import make_policy


def plain(module: nn.Module) -> Callable[..., Any]:
    """The forward that transformers gave a fused norm."""
    return type(module).__mro__[1].forward


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_all_norms_of_a_language_model_are_fused_and_compute_the_same(model_folder: Callable[..., Path], family: str) -> None:
    base = make_policy(model_folder(family)).base
    fused = fuse_norms(base)
    norms = [module for module in base.get_decoder().modules() if "RMSNorm" in type(module).__name__]
    assert {*norms} <= {*fused}
    for norm in norms:
        nn.init.normal_(norm.weight)
        of_both = []
        for forward in (nn.Module.__call__, plain(norm)):
            x = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(1), requires_grad=True)
            y = forward(norm, x)
            y.pow(3).sum().backward()
            of_both.append((y, x.grad))
        for ours, theirs in zip(*of_both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_fused_norm_rounds_less(model_folder: Callable[..., Path]) -> None:
    base = make_policy(model_folder("llava")).base
    norm = fuse_norms(base)[0]
    nn.init.normal_(norm.weight)
    norm.to(torch.bfloat16)
    x = torch.randn(64, len(norm.weight)).bfloat16()
    exact = plain(norm)(norm.float(), x.float())
    norm.to(torch.bfloat16)
    ours, theirs = norm(x), plain(norm)(norm, x)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < (theirs - exact).norm()


def test_what_is_given_in_another_type_than_its_weight_is_left_to_transformers(model_folder: Callable[..., Path]) -> None:
    norm = fuse_norms(make_policy(model_folder("llava")).base)[0]
    x = torch.randn(3, len(norm.weight)).bfloat16()
    assert torch.equal(norm(x), plain(norm)(norm, x))


def test_norms_of_another_formula_and_trained_ones_stay(model_folder: Callable[..., Path]) -> None:
    assert fuse_norms(make_policy(model_folder("gemma3")).base) == []
    assert fuse_norms(make_policy(model_folder("llava"), tuner=TunerConfig(sft_type="full")).base) == []

    class OffsetRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) + 0.001

    assert fuse_norms(OffsetRMSNorm()) == []
