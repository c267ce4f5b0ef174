"""The frozen copy of the model at the start, beside one of which all weights are trained."""

import dataclasses
from pathlib import Path

import pytest
import torch

from rayalign.algorithms import KTO
from rayalign.config.sections import TunerConfig
from rayalign.policy.sharding import layer_matrices
from tests.sharded_steps import FULL, Case, batches_of, policy_of
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_models import save_tiny_model

WITH_TOWER = dataclasses.replace(FULL, freeze_vit=False, freeze_aligner=False)


@pytest.mark.parametrize("tuner", [FULL, WITH_TOWER], ids=["language model", "tower, too"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_rounded_start_gives_the_numbers_of_the_model(tmp_path: Path, family: str, tuner: TunerConfig) -> None:
    folder = save_tiny_model(tmp_path / "model", family)
    case = Case(KTO(), family, tuner=tuner, dtype=torch.bfloat16)
    policy = policy_of(case, folder)
    assert policy.start is not None
    assert {p.dtype for p in layer_matrices(policy.start.base)} == {torch.bfloat16}
    batch = dataclasses.replace(batches_of(case, folder, ((0, 1),))[0], reference_logps=None)
    with torch.no_grad():
        images = policy.image_features(batch)
        own, reference = policy.logps(batch, images), policy.reference_logps(batch, images)
    assert torch.equal(own.chosen.total, reference.chosen.total)
    assert torch.equal(own.rejected.total, reference.rejected.total)


def test_a_start_has_no_copy_of_what_is_not_trained(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2_vl")
    policy = policy_of(Case(KTO(), "qwen2_vl", tuner=FULL, dtype=torch.bfloat16), folder)
    assert policy.start is not None
    copied = dict(policy.start.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert (copied[name].data_ptr() == parameter.data_ptr()) != parameter.requires_grad
        assert not copied[name].requires_grad
