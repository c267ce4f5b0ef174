"""Batches of held-out pairs and how they are made, without Ray (its streams: integration)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rayalign.data.batch import PairBatch
from rayalign.data.companions import Companion, Damaged, Mismatched
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.sampler import SamplerSettings, StepSampler, fetch_chunk
from rayalign.data.store import EncodedPair, PreparedData, from_batch
from rayalign.data.stream import ahead, batch_maker, held_out_pairs
from tests.tiny_models import encode_pair, make_policy, noise_image

RESPONSES = ("two", "a cat", "yes", "no", "The digit is two.", "A cat sits on the mat.", "the mat")
RED, BLUE = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
IMAGES = ((RED,), (), (BLUE, RED), (RED,), (), (BLUE,), ())


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava_next")


@pytest.fixture
def spec(folder: Path) -> EncoderSpec:
    return EncoderSpec(str(folder), responses="either")


@pytest.fixture
def pairs(folder: Path) -> list[EncodedPair]:
    """Seven records, of which the second is a single good response and the fourth a single bad one."""
    made = [encode_pair(folder, str(i), f"Which {i}?", RESPONSES[i], RESPONSES[i - 1], images=IMAGES[i]) for i in range(7)]
    made[1] = dataclasses.replace(made[1], rejected_ids=[])
    made[3] = dataclasses.replace(made[3], chosen_ids=[])
    return made


def contents(batch: PairBatch) -> dict[str, Any]:
    """All that a batch holds, to compare."""
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    plain["image_inputs"] = {name: value.tolist() for name, value in batch.image_inputs.items()}
    if batch.companion is not None:
        plain["companion"] = (contents(batch.companion.batch), batch.companion.rows.tolist())
    return plain


def as_in_training(
    data: PreparedData, sampler: StepSampler, spec: EncoderSpec, *, rank: int, companion: Companion | None
) -> Iterator[PairBatch]:
    """What a train worker makes of its fetches, as `pairs_in_order` does without Ray."""
    make_batch = batch_maker(spec, companion)
    for step in range(sampler.num_steps):
        chunk = pa.table({"first": [step], "last": [step + 1]})
        found = from_batch(fetch_chunk(chunk, data=data, settings=sampler.settings, rank=rank))
        for rows in sampler.micro_batches(step, rank):
            own, partners = found[: len(rows)], []
            del found[: len(rows)]
            if sampler.settings.with_partners:
                partners = found[: len(rows)]
                del found[: len(rows)]
            yield make_batch(own, partners)
        assert not found


@pytest.mark.parametrize("companion", [None, Mismatched(), Damaged()])
def test_held_out_batches_are_what_training_would_make_of_the_same_rows(
    prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData],
    spec: EncoderSpec,
    pairs: list[EncodedPair],
    companion: Companion | None,
) -> None:
    data = prepare_pairs(pairs)
    needs_partner = companion is not None and companion.needs_partner
    settings = SamplerSettings(
        global_batch_size=4,
        batch_size=2,
        num_workers=2,
        num_epochs=1,
        max_steps=None,
        seed=3,
        with_partners=needs_partner,
    )
    sampler = StepSampler(data.token_counts(), settings)
    order = np.concatenate([sampler.rows_of_step(step) for step in range(sampler.num_steps)])
    seen = []
    for rank in range(2):
        rows = [batch for step in range(sampler.num_steps) for batch in sampler.micro_batches(step, rank)]
        held_out = held_out_pairs(data, rows, spec, companion=companion, order=order if needs_partner else None)
        ours = [contents(batch) for batch in held_out]
        assert ours == [contents(batch) for batch in as_in_training(data, sampler, spec, rank=rank, companion=companion)]
        seen += [pair_id for batch in ours for pair_id in batch["ids"]]
    assert sorted(seen) == [pair.id for pair in pairs]


def test_a_held_out_pairs_partner_is_the_next_held_out_row_whatever_the_cut(
    prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData], spec: EncoderSpec, pairs: list[EncodedPair]
) -> None:
    data = prepare_pairs(pairs)
    order = np.array([0, 2, 3, 6])
    responses = {}
    for cut in ([[0, 2, 3, 6]], [[6], [3, 0], [2]]):
        for batch in held_out_pairs(data, [np.array(rows) for rows in cut], spec, companion=Mismatched(), order=order):
            assert batch.companion is not None
            rows = batch.companion.batch
            for b, pair_id in enumerate(batch.ids):
                sides = [rows.targets[rows.response_ids == b + side * batch.num_pairs].tolist() for side in (0, 1)]
                responses.setdefault(pair_id, []).append(sides)
    partners = {"0": pairs[2], "2": pairs[3], "3": pairs[6], "6": pairs[0]}
    assert responses == {pair_id: [[partner.chosen_ids, partner.rejected_ids]] * 2 for pair_id, partner in partners.items()}


def test_only_the_images_of_the_batchs_own_prompts_are_processed(spec: EncoderSpec, pairs: list[EncodedPair]) -> None:
    batch = batch_maker(spec, Mismatched())([pairs[1], pairs[3]], [pairs[2], pairs[5]])
    assert batch.companion is not None
    assert len(batch.image_inputs["pixel_values"]) == 1  # red, of the fourth record
    assert batch.image_slots == batch.companion.batch.image_slots == (0,)
    assert batch.companion.batch.image_inputs is batch.image_inputs


def test_batches_made_ahead_come_in_order_and_so_does_the_error_after_them() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise KeyError("six")

    stream = ahead(numbers(), depth=2)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="six"):
        next(stream)


def test_mismatched_rows_give_finite_log_probs_with_and_without_images(spec: EncoderSpec, pairs: list[EncodedPair]) -> None:
    batch = batch_maker(spec, Mismatched())(pairs, [*pairs[1:], pairs[0]])
    assert batch.companion is not None
    policy = make_policy(Path(spec.model))
    with torch.no_grad():
        logps = policy.logps(batch.companion.batch, policy.image_features(batch))
    assert logps.chosen.tokens.tolist() == [len(pair.chosen_ids) for pair in (*pairs[1:], pairs[0])]
    assert torch.isfinite(torch.cat([logps.chosen.total, logps.rejected.total])).all()
