import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayalign.data import sampler as plan_module
from rayalign.data.sampler import (
    SamplerSettings,
    StepCounts,
    StepSampler,
    cut_micro_batches,
    draw_rows,
    epoch_order,
    fetch_chunk,
    hold_out,
    nothing_held_out,
    partners_in,
)
from rayalign.data.store import EncodedPair, PreparedData, Rows, TokenCounts

NUM_ROWS = 43
STEPS_4_TO_6 = pa.table({"first": [4], "last": [7]})
SETTINGS = SamplerSettings(global_batch_size=8, batch_size=2, num_workers=1, num_epochs=2, max_steps=None, seed=7)


def token_counts_of(num_rows: int) -> TokenCounts:
    generator = np.random.default_rng(0)
    prompt, chosen, rejected = (generator.integers(1, high, num_rows) for high in (50, 20, 30))
    return TokenCounts(prompt, chosen, rejected)


def sampler_of(num_rows: int = NUM_ROWS, **changes: object) -> StepSampler:
    return StepSampler(token_counts_of(num_rows), SamplerSettings(**{**vars(SETTINGS), **changes}))


@pytest.fixture
def data(prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]) -> PreparedData:
    """Prepared rows of the lengths that the samplers here are made for."""
    counts = token_counts_of(NUM_ROWS)
    return prepare_pairs(
        [
            EncodedPair(str(row), [3] * counts.prompt[row], [4] * counts.chosen[row], [5] * counts.rejected[row], [], [])
            for row in range(NUM_ROWS)
        ]
    )


def rows_of_workers(sampler: StepSampler, step: int) -> list[int]:
    workers = range(sampler.settings.num_workers)
    return [int(row) for rank in workers for batch in sampler.micro_batches(step, rank) for row in batch]


def test_an_epoch_takes_every_row_exactly_once() -> None:
    sampler = sampler_of()
    assert sampler.steps_per_epoch == 6
    for epoch in (0, 1):
        steps = range(epoch * 6, epoch * 6 + 6)
        assert sorted(np.concatenate([sampler.rows_of_step(step) for step in steps])) == list(range(NUM_ROWS))


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    sampler = sampler_of()
    assert [len(sampler.rows_of_step(step)) for step in range(7)] == [8, 8, 8, 8, 8, 3, 8]
    assert sampler.counts(5).pairs == 3


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first, again = sampler_of(), sampler_of(num_workers=4, batch_size=1)
    again.rows_of_step(11)  # asking for another epoch first changes nothing
    for step in range(12):
        assert np.array_equal(first.rows_of_step(step), again.rows_of_step(step))
    orders = [tuple(epoch_order(np.arange(NUM_ROWS), seed=seed, epoch=epoch)) for seed in (7, 8) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6


def test_the_order_is_the_same_today_as_when_a_run_was_started() -> None:
    """An unfinished run is resumed by newer code: these numbers may change only together with the cache's format."""
    assert epoch_order(np.arange(10), seed=42, epoch=0).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    assert hold_out(10, ratio=0.2, seed=42)[1].tolist() == [5, 6]


def test_the_order_of_many_windows_is_the_same_today_as_when_a_run_was_started() -> None:
    """Of row numbers of any type: recorded when they took 8 bytes."""

    def fingerprint(rows: Rows) -> str:
        return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]

    training, held_out = hold_out(200_000, ratio=0.01, seed=42)
    assert (fingerprint(training), fingerprint(held_out)) == ("e2d9f89b638b8baf", "5dc9fbafbaf31c86")
    assert fingerprint(epoch_order(training, seed=42, epoch=0)) == "8c488a53bd0f10ed"
    assert fingerprint(epoch_order(training, seed=42, epoch=1)) == "830ee6efc3fdd890"
    assert fingerprint(draw_rows(held_out, at_most=1000, seed=42)) == "ca3ebdfe44baa267"
    everything, _ = hold_out(200_000, ratio=0, seed=42)
    assert fingerprint(epoch_order(everything, seed=42, epoch=0)) == "7fb6dee012c0885d"
    assert training.dtype == held_out.dtype == np.int32  # so that an order is 4 bytes a row


@pytest.mark.parametrize(
    ("num_rows", "ratio", "larger"),
    [
        (40, 0.01, ", or a larger --dataset_test_ratio such as 0.1"),
        (3, 0.1, ", or a larger --dataset_test_ratio such as 0.33"),
        (1, 0.5, ""),
    ],
)
def test_a_part_that_is_less_than_a_record_is_said(num_rows: int, ratio: float, larger: str) -> None:
    assert nothing_held_out(num_rows, ratio) == (
        f"nothing is held out, so that nothing is evaluated: {ratio} of {num_rows} records is less than one. Pass "
        f"--val_dataset{larger}."
    )


def test_a_part_of_a_record_or_more_and_none_by_choice_are_not_said() -> None:
    assert [nothing_held_out(100, ratio) for ratio in (0.01, 0.5, 0.0)] == [None] * 3


@pytest.mark.parametrize("packs_rows", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_and_micro_batches_share_out_exactly_the_rows_of_the_step(
    num_workers: int, batch_size: int, packs_rows: bool
) -> None:
    sampler = sampler_of(num_workers=num_workers, batch_size=batch_size, packs_rows=packs_rows)
    for step in range(sampler.num_steps):
        assert sorted(rows_of_workers(sampler, step)) == sorted(sampler_of().rows_of_step(step).tolist())
        batches = [batch for rank in range(num_workers) for batch in sampler.micro_batches(step, rank)]
        assert max(map(len, batches)) <= batch_size
        assert len(batches) == math.ceil(len(sampler.rows_of_step(step)) / batch_size)


@pytest.mark.parametrize("packs_rows", [False, True])
def test_the_cut_into_micro_batches_is_the_same_for_any_number_of_workers(packs_rows: bool) -> None:
    def batches(num_workers: int, step: int) -> set[tuple[int, ...]]:
        sampler = sampler_of(num_workers=num_workers, packs_rows=packs_rows)
        return {tuple(batch.tolist()) for rank in range(num_workers) for batch in sampler.micro_batches(step, rank)}

    for step in range(6):
        assert batches(1, step) == batches(2, step) == batches(4, step)


def test_micro_batches_hold_rows_of_similar_length_longest_first() -> None:
    sampler = sampler_of()
    for step in range(6):
        in_order = [sampler.token_counts.row_tokens(batch) for batch in sampler.micro_batches(step, 0)]
        tokens = np.concatenate(in_order)
        assert (np.diff(tokens) <= 0).all()


def test_micro_batches_without_padding_have_about_as_many_tokens_each() -> None:
    counts = TokenCounts(np.arange(1, 9), np.ones(8, dtype=int), np.zeros(8, dtype=int))  # rows of 2 to 9 tokens
    cut = [
        cut_micro_batches(np.arange(8), counts, batch_size=4, packs_rows=True, rank=rank, num_workers=2)[0] for rank in (0, 1)
    ]
    assert [counts.row_tokens(rows).tolist() for rows in cut] == [[9, 6, 5, 2], [8, 7, 4, 3]]


def test_micro_batches_are_dealt_to_and_fro() -> None:
    """The longest rows are not always the first worker's."""
    counts = TokenCounts(np.arange(9, 0, -1), np.zeros(9, dtype=int), np.zeros(9, dtype=int))
    cut = [
        [batch.tolist() for batch in cut_micro_batches(np.arange(9), counts, batch_size=2, rank=rank, num_workers=2)]
        for rank in (0, 1)
    ]
    assert cut == [[[0, 1], [6, 7], [8]], [[2, 3], [4, 5]]]


def test_a_worker_is_idle_where_a_step_has_fewer_micro_batches_than_workers() -> None:
    sampler = sampler_of(num_workers=4)
    last = [sampler.micro_batches(5, rank) for rank in range(4)]  # three rows: a micro-batch of two and one of one
    assert [[len(batch) for batch in batches] for batches in last] == [[2], [1], [], []]


def test_totals_are_the_sums_over_the_whole_step() -> None:
    sampler = sampler_of(num_workers=2)
    for step in range(6):
        rows = rows_of_workers(sampler, step)
        chosen, rejected = (
            sum(int(tokens[row]) for row in rows) for tokens in (sampler.token_counts.chosen, sampler.token_counts.rejected)
        )
        assert sampler.counts(step) == StepCounts(len(rows), 2 * len(rows), chosen, rejected)


@pytest.mark.parametrize(
    ("num_epochs", "max_steps", "num_steps"),
    [(1, None, 6), (2, None, 12), (0.5, None, 3), (0.01, None, 1), (1, 4, 4), (1, 9, 9)],
)
def test_the_number_of_steps_follows_epochs_unless_max_steps_is_given(
    num_epochs: float, max_steps: int | None, num_steps: int
) -> None:
    assert sampler_of(num_epochs=num_epochs, max_steps=max_steps).num_steps == num_steps


def test_held_out_rows_are_never_trained_on_and_always_the_same() -> None:
    sampler = sampler_of(held_out_ratio=0.2)
    trained = {int(row) for step in range(sampler.num_steps) for row in sampler.rows_of_step(step)}
    assert len(sampler.held_out) == 9
    assert trained.isdisjoint(sampler.held_out.tolist())
    assert trained | set(sampler.held_out.tolist()) == set(range(NUM_ROWS))
    assert np.array_equal(sampler.held_out, sampler_of(held_out_ratio=0.2, num_workers=4).held_out)
    assert not np.array_equal(sampler.held_out, sampler_of(held_out_ratio=0.2, seed=8).held_out)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_holding_out_leaves_at_least_one_row_to_train_on(num_rows: int) -> None:
    training, held_out = hold_out(num_rows, ratio=0.9, seed=0)
    assert len(training) == 1
    assert len(held_out) == num_rows - 1


def test_no_records_are_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        sampler_of(num_rows=0)
    assert str(caught.value) == "There are no records to train on."


def test_shuffling_stays_within_windows_of_neighbours_and_shuffles_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "WINDOW_ROWS", 10)
    order = epoch_order(np.arange(40), seed=3, epoch=0)
    windows = [order[start : start + 10] for start in range(0, 40, 10)]
    assert sorted(order) == list(range(40))
    assert [len(set(window // 10)) for window in windows] == [1, 1, 1, 1]  # each holds the rows of one window only
    assert [int(window[0]) // 10 for window in windows] != [0, 1, 2, 3]
    assert all(window.tolist() != sorted(window) for window in windows)


@pytest.mark.parametrize("start_step", [0, 1, 5, 11])
@pytest.mark.parametrize("chunk_pairs", [1, 20, 64, 10_000])
def test_chunks_cover_the_steps_from_the_start_to_the_end(
    monkeypatch: pytest.MonkeyPatch, chunk_pairs: int, start_step: int
) -> None:
    monkeypatch.setattr(plan_module, "CHUNK_PAIRS", chunk_pairs)
    sampler = sampler_of()
    chunks = sampler.chunks(start_step)
    assert [step for chunk in chunks for step in chunk] == list(range(start_step, 12))
    assert {len(chunk) for chunk in chunks[:-1]} <= {math.ceil(chunk_pairs / 8)}


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_fetch_returns_a_workers_pairs_in_the_order_it_trains_on_them(data: PreparedData, num_workers: int) -> None:
    sampler = sampler_of(num_workers=num_workers)
    for rank in range(num_workers):
        table = fetch_chunk(STEPS_4_TO_6, data=data, settings=sampler.settings, rank=rank)
        expected = [str(row) for step in (4, 5, 6) for batch in sampler.micro_batches(step, rank) for row in batch]
        assert table["id"].to_pylist() == expected


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_fetch_brings_the_partners_after_each_micro_batch(data: PreparedData, num_workers: int) -> None:
    sampler = sampler_of(num_workers=num_workers, with_partners=True)
    for rank in range(num_workers):
        table = fetch_chunk(STEPS_4_TO_6, data=data, settings=sampler.settings, rank=rank)
        expected = []
        for step in (4, 5, 6):
            for batch in sampler.micro_batches(step, rank):
                expected += [str(row) for row in batch]
                expected += [str(sampler.partners(step, np.array([row]))[0]) for row in batch]
        assert table["id"].to_pylist() == expected


def test_a_partner_is_the_next_row_of_the_order_and_the_lasts_is_the_first() -> None:
    order = np.array([4, 9, 0, 7])
    assert partners_in(order, np.array([0, 7, 4, 9])).tolist() == [7, 4, 9, 0]
    assert partners_in(order, np.array([], dtype=np.int64)).tolist() == []
    assert partners_in(np.array([5, 3]), np.array([3, 5])).tolist() == [5, 3]


def test_partners_depend_on_the_order_of_the_epoch_and_on_no_cut() -> None:
    sampler = sampler_of(with_partners=True)
    for step in range(sampler.num_steps):
        rows = sampler.rows_of_step(step)
        epoch = range(6) if step < 6 else range(6, 12)
        order = np.concatenate([sampler.rows_of_step(k) for k in epoch]).tolist()
        expected = {row: order[(order.index(row) + 1) % NUM_ROWS] for row in rows.tolist()}
        assert dict(zip(rows.tolist(), sampler.partners(step, rows).tolist(), strict=True)) == expected
        for num_workers, batch_size in ((1, 1), (2, 2), (4, 3)):
            other = sampler_of(with_partners=True, num_workers=num_workers, batch_size=batch_size)
            found = {
                int(row): int(partner)
                for rank in range(num_workers)
                for batch in other.micro_batches(step, rank)
                for row, partner in zip(batch, other.partners(step, batch), strict=True)
            }
            assert found == expected


@pytest.mark.parametrize(("num_rows", "held_out_ratio"), [(2, 0.0), (3, 0.0), (3, 0.33), (43, 0.2)])
def test_no_row_is_its_own_partner_and_none_is_held_out(num_rows: int, held_out_ratio: float) -> None:
    sampler = sampler_of(num_rows, held_out_ratio=held_out_ratio, with_partners=True)
    for step in range(sampler.num_steps):
        rows = sampler.rows_of_step(step)
        partners = sampler.partners(step, rows)
        assert (partners != rows).all()
        assert set(partners) <= set(sampler.rows)


@pytest.mark.parametrize(("num_rows", "held_out_ratio"), [(1, 0.0), (2, 0.5)])
def test_one_record_alone_has_no_partner(num_rows: int, held_out_ratio: float) -> None:
    with pytest.raises(ValueError) as caught:
        sampler_of(num_rows, held_out_ratio=held_out_ratio, with_partners=True)
    assert str(caught.value) == (
        "There is one record to train on, and kto compares each prompt with the responses to another one: add records."
    )
    sampler_of(num_rows, held_out_ratio=held_out_ratio)


def test_a_response_that_a_record_does_not_have_counts_in_no_total() -> None:
    counts = TokenCounts(prompt=np.array([9, 9, 9]), chosen=np.array([4, 0, 5]), rejected=np.array([3, 2, 0]))
    # Row 0 is a pair, row 1 a single bad response, row 2 a single good one.
    assert StepCounts.of(counts) == StepCounts(pairs=3, responses=4, chosen_tokens=9, rejected_tokens=5)
    assert StepCounts.of(counts.take(np.array([2]))) == StepCounts(pairs=1, responses=1, chosen_tokens=5, rejected_tokens=0)


def test_counts_of_encoded_pairs_are_those_of_their_tokens() -> None:
    pairs = [EncodedPair("a", [5, 6], [7, 2], [8], [], []), EncodedPair("good", [4], [9], [], [], [])]
    tokens = TokenCounts.of(pairs)
    assert [side.tolist() for side in (tokens.prompt, tokens.chosen, tokens.rejected)] == [[2, 1], [2, 1], [1, 0]]
    assert StepCounts.of(tokens) == StepCounts(pairs=2, responses=3, chosen_tokens=3, rejected_tokens=1)
    assert StepCounts.of(TokenCounts.of(pairs[:0])) == StepCounts(0, 0, 0, 0)  # an idle worker's


def test_a_single_held_out_record_finds_its_partner_among_the_training_records() -> None:
    sampler = sampler_of(held_out_ratio=1 / NUM_ROWS)
    assert len(sampler.held_out) == 1
    (partner,) = partners_in(sampler.held_out_order, sampler.held_out)
    assert partner in sampler.rows.tolist()
    several = sampler_of(held_out_ratio=0.2)
    assert set(several.held_out.tolist()) > set(partners_in(several.held_out_order, several.held_out).tolist()[:-1])


def test_a_batch_holds_no_more_tokens_than_allowed_unless_one_row_alone_does() -> None:
    counts = TokenCounts(*(np.array(side) for side in ([2, 7, 1, 3, 1, 9, 1], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0])))
    # Tokens of the rows: 4, 9, 3, 4, 2, 10, 1. Longest first, each batch is as wide as its first row.
    cut = [
        batch.tolist() for batch in cut_micro_batches(np.arange(7), counts, batch_size=3, max_tokens=9, rank=0, num_workers=1)
    ]
    assert cut == [[5], [1], [0, 3], [2, 4, 6]]
    assert [len(batch) * counts.row_tokens(np.array(batch)).max() for batch in cut] == [10, 9, 8, 9]


def test_tokens_that_are_limited_are_counted_without_padding_where_there_is_none() -> None:
    counts = TokenCounts(np.array([8, 2, 2, 1, 1]), np.zeros(5, dtype=int), np.zeros(5, dtype=int))
    limits: dict[str, Any] = {"batch_size": 4, "max_tokens": 11, "rank": 0, "num_workers": 1}
    rows = np.arange(5)
    assert [batch.tolist() for batch in cut_micro_batches(rows, counts, **limits)] == [[0], [1, 2, 3, 4]]
    assert [batch.tolist() for batch in cut_micro_batches(rows, counts, packs_rows=True, **limits)] == [[0, 1], [2, 3, 4]]


def test_a_limit_on_tokens_changes_the_cut_of_a_step_and_not_its_rows() -> None:
    samplers = sampler_of(32), sampler_of(32, batch_size=4, max_tokens_per_batch=1)
    for step in range(samplers[0].num_steps):
        assert samplers[0].rows_of_step(step).tolist() == samplers[1].rows_of_step(step).tolist()
        batches = samplers[1].micro_batches(step, 0)
        assert [len(batch) for batch in batches] == [1] * len(samplers[1].rows_of_step(step))
