import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rayalign.data.batch import PairBatch, assemble, with_damaged, with_mismatched
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.rows import CHOSEN, PAD, PROMPT, REJECTED

# One row per pair: a is five tokens long, b four, so b is padded with one.
PAIR_A = EncodedPair("a", [5, 6], [7, 2], [8], [b"red"], ["hash of red"], margin=0.5)
PAIR_B = EncodedPair("b", [4], [9], [7, 2], [b"blue", b"red"], ["hash of blue", "hash of red"])

# A single good response and a single bad one.
GOOD = EncodedPair("good", [4, 5, 6], [7, 2], [], [], [])
BAD = EncodedPair("bad", [4], [], [8, 9, 2], [b"red"], ["hash of red"])

LAYOUT = RowLayout(pad_token_id=0)


def first_letters(contents: Sequence[bytes], alone: Sequence[bool]) -> ImageInputs:
    return ImageInputs({"pixel_values": torch.tensor([content[0] for content in contents])})


def batch_of(*pairs: EncodedPair) -> PairBatch:
    return assemble(pairs, layout=LAYOUT, process_images=first_letters)


def test_a_row_is_prompt_chosen_rejected_and_padding() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    assert batch.ids == ("a", "b")
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8], [4, 9, 7, 2, 0]]
    assert batch.segment_ids.tolist() == [
        [PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED],
        [PROMPT, CHOSEN, REJECTED, REJECTED, PAD],
    ]
    assert batch.margins.tolist() == [0.5, 0.0]
    assert (batch.num_pairs, batch.num_tokens) == (2, 9)
    assert batch.row_lengths == ((2, 5), (1, 4))


def test_positions_start_again_for_the_rejected_response() -> None:
    assert batch_of(PAIR_A, PAIR_B).position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 0]]


def test_each_response_token_is_predicted_by_the_token_before_it_and_the_first_by_the_prompt() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), batch.response_ids.tolist(), strict=True)) == [
        (1, 7, 0),  # pair a, chosen: 7 after the prompt's 6
        (2, 2, 0),  # 2 after 7
        (1, 8, 2),  # pair a, rejected: 8 after the prompt's 6, not after the chosen 2
        (5, 9, 1),  # pair b, chosen: 9 after the prompt's 4, the first token of the second row
        (5, 7, 3),  # pair b, rejected
        (7, 2, 3),
    ]


def test_each_distinct_image_is_processed_once_and_every_place_names_its_own() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    assert batch.image_inputs["pixel_values"].tolist() == [ord("r"), ord("b")]
    assert batch.image_slots == (0, 1, 0)  # a: red; b: blue, red


def test_a_batch_without_images_has_no_image_inputs() -> None:
    batch = batch_of(EncodedPair("c", [4], [9], [7], [], []))
    assert batch.image_inputs == {}
    assert batch.image_slots == ()


def test_rows_for_sft_hold_no_rejected_tokens() -> None:
    batch = batch_of(*(dataclasses.replace(pair, rejected_ids=[]) for pair in (PAIR_A, PAIR_B)))
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [4, 9, 0, 0]]
    assert batch.segment_ids.tolist() == [[PROMPT, PROMPT, CHOSEN, CHOSEN], [PROMPT, CHOSEN, PAD, PAD]]
    assert batch.response_ids.tolist() == [0, 0, 1]
    assert batch.predictors.tolist() == [1, 2, 4]


def test_a_row_of_a_single_response_has_no_place_for_the_other_side() -> None:
    batch = batch_of(PAIR_A, GOOD, BAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8], [4, 5, 6, 7, 2], [4, 8, 9, 2, 0]]
    assert batch.segment_ids.tolist() == [
        [PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED],
        [PROMPT, PROMPT, PROMPT, CHOSEN, CHOSEN],
        [PROMPT, REJECTED, REJECTED, REJECTED, PAD],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), batch.response_ids.tolist(), strict=True)) == [
        (1, 7, 0),  # the pair's chosen response
        (2, 2, 0),
        (1, 8, 3),  # the pair's rejected one
        (7, 7, 1),  # the good response: chosen of the second row
        (8, 2, 1),
        (10, 8, 5),  # the bad one: rejected of the third
        (11, 9, 5),
        (12, 2, 5),
    ]


def test_the_ends_are_the_last_tokens_of_the_responses_or_of_the_prompt_where_there_is_none() -> None:
    batch = batch_of(PAIR_A, GOOD, BAD, PAIR_B)
    # Rows of five tokens: a from 0 on, good from 5, bad from 10, b from 15.
    assert batch.last_token.tolist() == [
        *(3, 9, 10, 16),  # chosen: a's 2, good's 2; bad has none, so its prompt's 4; b's 9
        *(4, 7, 13, 18),  # rejected: a's 8; good has none, so its prompt's 6; bad's 2; b's 2
    ]
    assert batch.input_ids.flatten()[batch.last_token].tolist() == [2, 2, 4, 9, 8, 6, 2, 2]


def test_moving_a_batch_keeps_its_contents() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    moved = batch.to(torch.device("cpu"))
    assert moved.ids == batch.ids
    assert moved.image_slots == batch.image_slots
    for name in ("input_ids", "segment_ids", "places", "position_ids", "predictors", "targets", "sequences", "ends", "margins"):
        assert torch.equal(vars(moved)[name], vars(batch)[name]), name
    assert torch.equal(moved.image_inputs["pixel_values"], batch.image_inputs["pixel_values"])


def damaged_letters(contents: Sequence[bytes], alone: Sequence[bool], seeds: Sequence[str]) -> ImageInputs:
    """Every image under its own seed, as numbers."""
    assert len(contents) == len(seeds)
    letters = [[content[0], *seed.encode()] for content, seed in zip(contents, seeds, strict=True)]
    return ImageInputs({"pixel_values": torch.tensor(letters)})


def damaged_batch(*pairs: EncodedPair) -> PairBatch:
    return with_damaged(batch_of(*pairs), pairs, layout=LAYOUT, process_damaged=damaged_letters)


def mismatched_batch(pairs: Sequence[EncodedPair], others: Sequence[EncodedPair]) -> PairBatch:
    return with_mismatched(batch_of(*pairs), pairs, others, layout=LAYOUT)


def test_every_tensor_of_a_batch_and_of_its_companion_is_moved() -> None:
    given = damaged_batch(PAIR_A, PAIR_B)
    moved = given.to(torch.device("meta"))
    assert moved.companion is not None
    assert given.companion is not None
    tensors = [moved.companion.rows]
    for batch in (moved, moved.companion.batch):
        tensors += [value for value in vars(batch).values() if isinstance(value, Tensor)]
        tensors += batch.image_inputs.values()
    assert len(tensors) == 1 + 2 * (9 + 1)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.companion.batch.ids == given.companion.batch.ids
    assert moved.companion.batch.image_slots == given.companion.batch.image_slots
    assert given.input_ids.device.type == "cpu"


def test_mismatched_rows_are_each_prompt_with_the_responses_to_another_one() -> None:
    batch = mismatched_batch([PAIR_A, PAIR_B, GOOD], [PAIR_B, BAD, PAIR_A])
    assert batch.companion is not None
    rows = batch.companion.batch
    assert rows.ids == batch.ids == ("a", "b", "good")
    assert rows.input_ids.tolist() == [
        [5, 6, 9, 7, 2, 0],  # a's prompt, b's responses
        [4, 8, 9, 2, 0, 0],  # b's prompt, the bad response
        [4, 5, 6, 7, 2, 8],  # good's prompt, a's responses
    ]
    assert rows.segment_ids.tolist() == [
        [PROMPT, PROMPT, CHOSEN, REJECTED, REJECTED, PAD],
        [PROMPT, REJECTED, REJECTED, REJECTED, PAD, PAD],
        [PROMPT, PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED],
    ]
    assert batch.companion.rows.tolist() == [0, 1, 2]
    assert batch.input_ids.tolist() == batch_of(PAIR_A, PAIR_B, GOOD).input_ids.tolist()
    assert batch.num_tokens == (5 + 4 + 5) + (5 + 4 + 6)


def test_mismatched_rows_look_at_the_images_of_their_prompt_in_the_batch() -> None:
    batch = mismatched_batch([PAIR_A, GOOD, PAIR_B], [PAIR_B, BAD, BAD])
    assert batch.companion is not None
    # a: red; good: none; b: blue, red. The bad response's picture is not looked at: its own prompt isn't there.
    assert batch.companion.batch.image_slots == batch.image_slots == (0, 1, 0)
    assert batch.companion.batch.image_inputs is batch.image_inputs
    moved = batch.to(torch.device("meta"))
    assert moved.companion is not None
    assert moved.companion.batch.image_inputs["pixel_values"] is moved.image_inputs["pixel_values"]


def test_damaged_rows_are_prompt_and_chosen_of_the_pairs_that_have_images() -> None:
    batch = damaged_batch(PAIR_A, GOOD, PAIR_B)
    assert batch.companion is not None
    rows = batch.companion.batch
    assert batch.companion.rows.tolist() == [0, 2]
    assert rows.ids == ("a", "b")
    assert rows.input_ids.tolist() == [[5, 6, 7, 2], [4, 9, 0, 0]]
    assert rows.segment_ids.tolist() == [[PROMPT, PROMPT, CHOSEN, CHOSEN], [PROMPT, CHOSEN, PAD, PAD]]
    assert batch.num_tokens == (5 + 5 + 4) + (4 + 2)
    assert batch.input_ids.tolist() == batch_of(PAIR_A, GOOD, PAIR_B).input_ids.tolist()
    assert batch.image_inputs["pixel_values"].tolist() == [ord("r"), ord("b")]


def test_every_image_of_every_pair_is_damaged_in_its_own_way() -> None:
    batch = damaged_batch(PAIR_A, PAIR_B)
    assert batch.companion is not None
    found = [bytes(line).decode() for line in batch.companion.batch.image_inputs["pixel_values"].tolist()]
    assert found == ["ra/0", "bb/0", "rb/1"]  # the picture's first letter, then its seed: red is damaged twice
    assert batch.companion.batch.image_slots == (0, 1, 2)


def test_a_pairs_damage_is_the_same_in_every_micro_batch_and_order() -> None:
    seeds = set()
    for pairs in ([PAIR_A, PAIR_B], [PAIR_B, PAIR_A], [PAIR_B], [GOOD, PAIR_B]):
        batch = damaged_batch(*pairs)
        assert batch.companion is not None
        rows = batch.companion.batch
        start = 1 if rows.ids[0] == "a" else 0
        images = [rows.image_inputs["pixel_values"][slot].tolist() for slot in rows.image_slots[start : start + 2]]
        seeds.add(tuple(bytes(line).decode() for line in images))
    assert seeds == {("bb/0", "rb/1")}


def test_a_batch_without_images_has_nothing_to_damage() -> None:
    assert damaged_batch(GOOD).companion is None
