import importlib
import pkgutil
import subprocess
import sys

import pytest

import rayalign

MODULES = ["rayalign", *(module.name for module in pkgutil.walk_packages(rayalign.__path__, "rayalign."))]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__ is not None or name == "rayalign"


def test_the_packages_modules_are_all_found() -> None:
    assert {
        "rayalign.training.loop",
        "rayalign.training.driver",
        "rayalign.algorithms.dpo",
        "rayalign.models.llava",
    } <= set(MODULES)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("rayalign.training.loop, rayalign.training.checkpoint", {"ray"}),
        # Ray Data's fetches run in processes that start beside the training, and would import for seconds.
        ("rayalign.data.sampler, rayalign.data.store", {"ray", "torch", "transformers"}),
        # So does Ray Train's controller.
        ("rayalign.training.entry", {"numpy", "ray", "torch", "transformers"}),
        ("rayalign.training.driver", {"peft"}),
    ],
)
def test_a_module_loads_nothing_that_it_has_no_use_for(modules: str, absent: set[str]) -> None:
    script = f"import sys, {modules}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "rayalign" in done.stdout.split()
    assert absent.isdisjoint(done.stdout.split())


def test_the_algorithms_flags_are_read_without_torch_and_their_losses_with_it() -> None:
    script = (
        "import sys; from rayalign.algorithms import ALGORITHMS; from rayalign.algorithms.terms import logistic_loss\n"
        "print('torch' in sys.modules)\n"
        "import torch; zero = torch.zeros(())\n"
        "print(logistic_loss(zero).item() == -torch.nn.functional.logsigmoid(zero).item())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
