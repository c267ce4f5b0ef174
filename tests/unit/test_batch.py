import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from rayalign.batch import CHOSEN, PAD, PROMPT, REJECTED, PairBatch, assemble, attention_mask
from rayalign.prepared import EncodedPair

# One row per pair: a is five tokens long, b four, so b is padded with one.
PAIR_A = EncodedPair("a", [5, 6], [7, 2], [8], [b"red"], ["hash of red"], margin=0.5)
PAIR_B = EncodedPair("b", [4], [9], [7, 2], [b"blue", b"red"], ["hash of blue", "hash of red"])

# The row `[prompt | chosen | rejected | padding]` that the truth tables below are written for.
SEGMENTS = torch.tensor([[PROMPT, PROMPT, CHOSEN, REJECTED, REJECTED, PAD, PAD]])
POSITIONS = torch.tensor([[0, 1, 2, 2, 3, 0, 0]])


def first_letters(contents: Sequence[bytes]) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.tensor([content[0] for content in contents])}


def batch_of(*pairs: EncodedPair) -> PairBatch:
    return assemble(pairs, pad_token_id=0, process_images=first_letters)


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


def test_positions_start_again_for_the_rejected_response() -> None:
    assert batch_of(PAIR_A, PAIR_B).position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 0]]


def test_each_response_token_is_predicted_by_the_token_before_it_and_the_first_by_the_prompt() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), batch.sequences.tolist(), strict=True)) == [
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
    assert batch.sequences.tolist() == [0, 0, 1]
    assert batch.predictors.tolist() == [1, 2, 4]


def test_a_response_sees_the_prompt_and_itself_but_never_the_other_response() -> None:
    mask = attention_mask(SEGMENTS, POSITIONS)
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 1, 0, 0, 0, 0],  # chosen
        [1, 1, 0, 1, 0, 0, 0],  # rejected: not the chosen token
        [1, 1, 0, 1, 1, 0, 0],  # rejected
        [1, 1, 0, 0, 0, 1, 0],  # padding: nobody reads it
        [1, 1, 0, 0, 0, 0, 1],  # padding: not even other padding
    ]


def test_the_sliding_window_counts_positions_not_places_in_the_row() -> None:
    mask = attention_mask(SEGMENTS, POSITIONS, sliding_window=2)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # position 0
        [1, 1, 0, 0, 0, 0, 0],  # position 1
        [0, 1, 1, 0, 0, 0, 0],  # chosen, position 2: the prompt's position 1 is one back
        [0, 1, 0, 1, 0, 0, 0],  # rejected, position 2: so it is here, though two places back
        [0, 0, 0, 1, 1, 0, 0],  # rejected, position 3
        [1, 1, 0, 0, 0, 1, 0],  # padding
        [1, 1, 0, 0, 0, 0, 1],  # padding
    ]


@pytest.mark.parametrize("sliding_window", [None, 1, 3])
def test_no_query_is_without_a_key_and_no_token_reads_padding(sliding_window: int | None) -> None:
    long = EncodedPair("long", list(range(3, 9)), [7] * 5, [8] * 4, [], [])
    batch = batch_of(long, PAIR_B)
    mask = attention_mask(batch.segment_ids, batch.position_ids, sliding_window=sliding_window)
    assert mask.any(dim=-1).all()
    real, padding = batch.segment_ids[1] != PAD, batch.segment_ids[1] == PAD
    assert not mask[1, 0][real][:, padding].any()


def test_moving_a_batch_keeps_its_contents() -> None:
    batch = batch_of(PAIR_A, PAIR_B)
    moved = batch.to(torch.device("cpu"))
    assert moved.ids == batch.ids
    assert moved.image_slots == batch.image_slots
    for name in ("input_ids", "segment_ids", "position_ids", "predictors", "targets", "sequences", "margins"):
        assert torch.equal(vars(moved)[name], vars(batch)[name]), name
    assert torch.equal(moved.image_inputs["pixel_values"], batch.image_inputs["pixel_values"])
