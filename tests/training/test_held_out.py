"""Which held-out records a run evaluates."""

import logging
from collections.abc import Callable, Sequence

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import config_from_mapping
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.data.stream import sampler_of
from rayalign.models.source import ModelSource
from rayalign.training.held_out import HeldOut


@pytest.mark.parametrize("at_most", [9, 10])
def test_of_more_records_than_are_evaluated_the_same_ones_are_drawn_each_time_which_is_said_once(
    prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData],
    model_folder: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
    at_most: int,
) -> None:
    pairs = [EncodedPair(str(i), [1], [2], [3], [], []) for i in range(40)]
    data = RunData(ModelSource("m"), EncoderSpec(str(model_folder("llava")), "both"), prepare_pairs(pairs), None)
    config = config_from_mapping(DPO, {"dataset_test_ratio": 0.25, "max_eval_records": at_most})
    sampler = sampler_of(config, data)
    with caplog.at_level(logging.INFO, logger="rayalign"):
        shares = [HeldOut(config, data, sampler, rank=rank, num_workers=2) for rank in (0, 1)]
    assert shares[0].rows.tolist() == shares[1].rows.tolist()
    assert len(shares[0].rows) == at_most
    assert set(shares[0].rows.tolist()) <= set(sampler.held_out.tolist())
    words = "Evaluation: of 10 held-out records, 9 are drawn and evaluated, the same ones each time (--max_eval_records)"
    assert caplog.messages == ([words] if at_most == 9 else [])
