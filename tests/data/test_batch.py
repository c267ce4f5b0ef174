import dataclasses
from collections.abc import Sequence

import pytest
import torch

from rayalign.data.batch import PairBatch, assemble
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

TENSORS = (
    *(
        "input_ids",
        "segment_ids",
        "position_in_sequence",
        "position_ids",
        "predictors",
        "targets",
        "response_ids",
        "last_token",
    ),
    "margins",
)


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
    for name in TENSORS:
        assert torch.equal(vars(moved)[name], vars(batch)[name]), name
    assert torch.equal(moved.image_inputs["pixel_values"], batch.image_inputs["pixel_values"])


def test_images_that_become_more_or_fewer_features_than_a_prompt_has_image_tokens_are_an_error_of_its_record() -> None:
    image = 3
    layout = RowLayout(pad_token_id=0, image_token_id=image)
    first = EncodedPair("first", [4, image, image, 5], [7], [8], [b"red"], ["hash of red"])
    second = EncodedPair("data.jsonl:9", [image, image, 4, image], [7], [8], [b"red", b"blue"], ["hash of red", "hash of blue"])
    text = EncodedPair("text", [4], [7], [8], [], [])

    def features(red: int, blue: int) -> PairBatch:
        images = ImageInputs({"pixel_values": torch.zeros(2)}, (red, blue))
        return assemble([text, first, second], layout=layout, process_images=lambda contents, alone: images)

    assert features(2, 1).image_lengths == (2, 1)
    with pytest.raises(ValueError) as caught:
        features(2, 2)
    assert str(caught.value) == (
        "Record data.jsonl:9: its prompt has 3 image tokens, and its 2 images become 4 features. It seems encoded by other "
        "versions of transformers or of the processor: start with an empty --cache_dir, and with the same versions on all "
        "machines."
    )
    with pytest.raises(ValueError, match="Record first: its prompt has 2 image tokens, and its 1 images become 1 features"):
        features(1, 2)  # as many features in all of them
