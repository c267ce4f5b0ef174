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
    assert {"rayalign.loop", "rayalign.train", "rayalign.algorithms.dpo", "rayalign.models.llava"} <= set(MODULES)


def test_the_training_loop_needs_no_ray() -> None:
    script = "import sys, rayalign.loop, rayalign.checkpoint; print([m for m in sys.modules if m.split('.')[0] == 'ray'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
