"""What the unit tests share: tiny models on disk, each made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder(family, **text)`: the folder of a family's tiny model, with changes to its text config."""

    @functools.cache
    def make(family: str, **text: Any) -> Path:
        from tests.tiny_models import save_tiny_model  # imports torch and transformers, which many tests never touch

        return save_tiny_model(tmp_path_factory.mktemp(family), family, text=text)

    return make
