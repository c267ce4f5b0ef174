"""examples/template/my_loss.py computes what its docstring says (tests/integration/test_plugins.py trains with it)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayalign.algorithms import ALGORITHMS
from rayalign.config.plugins import load_plugins
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, wake_adapters

TEMPLATE = Path(__file__).parents[1] / "examples" / "template" / "my_loss.py"


def test_the_templates_loss_is_the_squared_hinge_of_the_rewards(model_folder: Callable[..., Path]) -> None:
    (plugin,) = load_plugins([str(TEMPLATE)], ALGORITHMS)
    algorithm = plugin.algorithms["squared_hinge"](beta=0.5, margin=2.0)
    folder = model_folder("llava")
    pairs = [encode_pair(folder, str(i), "Which digit?", chosen, "a cat") for i, chosen in enumerate(("two", "It is two."))]
    batch, counts = make_batch(folder, pairs), counts_of(pairs)
    policy = make_policy(folder, needs=algorithm.needs)
    assert algorithm.loss(policy, batch, counts).loss.item() == pytest.approx(4)  # rewards of 0
    wake_adapters(policy)
    output = algorithm.loss(policy, batch, counts)
    margins = output.pair_metrics["rewards/margins"]
    assert margins.abs().min() > 0.01
    torch.testing.assert_close(output.loss.detach(), (2 - margins).clamp(min=0).square().mean())
    assert output.loss.requires_grad
