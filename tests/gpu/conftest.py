"""The device of the GPU tests, and tiny models on disk.

pytest tests/gpu                                     # on the first GPU; without one, all of them are skipped
RAYALIGN_GPU_TESTS_ON=cpu pytest tests/gpu           # the same tests on the CPU, to see that they work
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    wanted = torch.device(os.environ.get("RAYALIGN_GPU_TESTS_ON", "cuda"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return wanted


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the towers' first layers round float32 to three digits on GPUs, and not alike for any number of images."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def model_folder(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(family)`: the folder of a family's tiny model."""

    @functools.cache
    def make(family: str) -> Path:
        from tests.tiny_models import save_tiny_model

        return save_tiny_model(tmp_path_factory.mktemp(family), family)

    return make
