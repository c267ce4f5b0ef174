"""A model that is only looked at runs what its files hold, and nothing beside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from rayalign.algorithms import SFT
from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig
from rayalign.data.rows import Sources
from rayalign.evaluation.loaded_model import load_model
from rayalign.policy.saving import save_policy
from tests.tiny_models import make_policy, wake_adapters

NOWHERE = Sources((), None, False)


def test_an_adapter_runs_where_the_model_has_one_and_none_where_it_has_none(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(model_folder("llava"))
    save_policy(wake_adapters(make_policy(model_folder("llava"))), tmp_path / "dpo")
    numbers = {}
    for name, number_of_adapters in ((base, 0), (str(tmp_path / "dpo"), 1)):
        model = load_model(Config(SFT(), model=ModelConfig(model=name)), NOWHERE)
        layers: list[Any] = [layer for layer in model.policy.model.modules() if isinstance(layer, BaseTunerLayer)]
        assert {len(layer.active_adapters) for layer in layers} == {number_of_adapters}
        row = {"query": "What is it?", "response": "A cat.", "rejected_response": "A dog."}
        record = model.record({"id": "1", "folder": str(tmp_path), "row": row})
        batch = model.batch([model.encode(record, str(tmp_path))])
        numbers[name] = model.logps(batch).chosen.total
        start = model.reference_logps(batch).chosen.total
        assert torch.equal(start, numbers[base])
    assert not torch.equal(*numbers.values())
