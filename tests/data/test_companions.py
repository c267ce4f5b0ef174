"""Rows beside those of the pairs: what they hold, which images they look at, and what the run may know of them."""

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rayalign.algorithms import KTO, MDPO, Needs
from rayalign.data.batch import ImageChange, PairBatch, assemble
from rayalign.data.companions import Companion, Damaged, Mismatched, with_companion
from rayalign.data.reference_store import ReferenceLogps
from rayalign.data.store import EncodedPair
from rayalign.images.damage import damage_image
from rayalign.images.fetch import open_image
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.rows import CHOSEN, PAD, PROMPT, REJECTED
from tests.tiny_models import noise_image

RED, BLUE = noise_image(40, 30, seed=1), noise_image(40, 30, seed=2)

# A pair with one image, one with two of which the second is the first pair's, a single good response and a single bad one.
PAIR_A = EncodedPair("a", [5, 6], [7, 2], [8], [RED], ["hash of red"])
PAIR_B = EncodedPair("b", [4], [9], [7, 2], [BLUE, RED], ["hash of blue", "hash of red"])
GOOD = EncodedPair("good", [4, 5, 6], [7, 2], [], [], [])
BAD = EncodedPair("bad", [4], [], [8, 9, 2], [RED], ["hash of red"])

LAYOUT = RowLayout(pad_token_id=0)
COMPANIONS: tuple[Companion, ...] = (Mismatched(), Damaged())


def pixels(contents: Sequence[bytes], alone: Sequence[bool], change: ImageChange | None = None) -> ImageInputs:
    """Images as their pixels; all are of one size."""
    opened = [open_image(content) for content in contents]
    changed = opened if change is None else change(opened)
    return ImageInputs({"pixel_values": torch.stack([torch.from_numpy(np.array(image)) for image in changed])})


def damaged_pixels(content: bytes, seed: str) -> Tensor:
    return torch.from_numpy(np.array(damage_image(open_image(content), seed=seed)))


def batch_of(
    pairs: Sequence[EncodedPair],
    companion: Companion | None = None,
    partners: Sequence[EncodedPair] = (),
    *,
    layout: RowLayout = LAYOUT,
) -> PairBatch:
    batch = assemble(pairs, layout=layout, process_images=pixels)
    return with_companion(batch, companion, pairs, partners, layout=layout, process_images=pixels)


def test_without_a_companion_a_batch_stays_as_it_is() -> None:
    batch = assemble([PAIR_A], layout=LAYOUT, process_images=pixels)
    assert with_companion(batch, None, [PAIR_A], layout=LAYOUT, process_images=pixels) is batch


def test_every_tensor_of_a_batch_and_of_its_companion_is_moved() -> None:
    given = batch_of([PAIR_A, PAIR_B], Damaged())
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
    batch = batch_of([PAIR_A, PAIR_B, GOOD], Mismatched(), [PAIR_B, BAD, PAIR_A])
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
    assert batch.input_ids.tolist() == batch_of([PAIR_A, PAIR_B, GOOD]).input_ids.tolist()
    assert batch.num_tokens == (5 + 4 + 5) + (5 + 4 + 6)


def test_mismatched_rows_look_at_the_images_of_their_prompt_in_the_batch() -> None:
    batch = batch_of([PAIR_A, GOOD, PAIR_B], Mismatched(), [PAIR_B, BAD, BAD])
    assert batch.companion is not None
    # a: red; good: none; b: blue, red. The bad response's picture is not looked at: its own prompt isn't there.
    assert batch.companion.batch.image_slots == batch.image_slots == (0, 1, 0)
    assert batch.companion.batch.image_inputs is batch.image_inputs
    moved = batch.to(torch.device("meta"))
    assert moved.companion is not None
    assert moved.companion.batch.image_inputs["pixel_values"] is moved.image_inputs["pixel_values"]


def test_damaged_rows_are_prompt_and_chosen_of_the_pairs_that_have_images() -> None:
    batch = batch_of([PAIR_A, GOOD, PAIR_B], Damaged())
    assert batch.companion is not None
    rows = batch.companion.batch
    assert batch.companion.rows.tolist() == [0, 2]
    assert rows.ids == ("a", "b")
    assert rows.input_ids.tolist() == [[5, 6, 7, 2], [4, 9, 0, 0]]
    assert rows.segment_ids.tolist() == [[PROMPT, PROMPT, CHOSEN, CHOSEN], [PROMPT, CHOSEN, PAD, PAD]]
    assert batch.num_tokens == (5 + 5 + 4) + (4 + 2)
    plain = batch_of([PAIR_A, GOOD, PAIR_B])
    assert batch.input_ids.tolist() == plain.input_ids.tolist()
    assert torch.equal(batch.image_inputs["pixel_values"], plain.image_inputs["pixel_values"])


def test_every_image_of_every_pair_is_damaged_in_its_own_way() -> None:
    batch = batch_of([PAIR_A, PAIR_B], Damaged())
    assert batch.companion is not None
    expected = [damaged_pixels(RED, "a/0"), damaged_pixels(BLUE, "b/0"), damaged_pixels(RED, "b/1")]  # red is damaged twice
    assert torch.equal(batch.companion.batch.image_inputs["pixel_values"], torch.stack(expected))
    assert batch.companion.batch.image_slots == (0, 1, 2)


def test_damage_goes_by_the_pair_where_images_that_are_alone_come_first() -> None:
    layout = RowLayout(pad_token_id=0, features_by_company=True)
    batch = batch_of([PAIR_B, PAIR_A], Damaged(), layout=layout)
    assert batch.companion is not None
    rows = batch.companion.batch
    found = [rows.image_inputs["pixel_values"][slot] for slot in rows.image_slots]
    expected = [damaged_pixels(BLUE, "b/0"), damaged_pixels(RED, "b/1"), damaged_pixels(RED, "a/0")]
    assert rows.image_slots == (1, 2, 0)  # a's image is alone
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_pairs_damage_is_the_same_in_every_micro_batch_and_order() -> None:
    expected = torch.stack([damaged_pixels(BLUE, "b/0"), damaged_pixels(RED, "b/1")])
    for pairs in ([PAIR_A, PAIR_B], [PAIR_B, PAIR_A], [PAIR_B], [GOOD, PAIR_B]):
        batch = batch_of(pairs, Damaged())
        assert batch.companion is not None
        rows = batch.companion.batch
        start = 1 if rows.ids[0] == "a" else 0
        images = [rows.image_inputs["pixel_values"][slot] for slot in rows.image_slots[start : start + 2]]
        assert torch.equal(torch.stack(images), expected)


def test_a_batch_without_images_has_nothing_to_damage() -> None:
    assert batch_of([GOOD], Damaged()).companion is None


def test_rows_that_change_with_the_epoch_bring_no_stored_log_probs_along_and_those_that_do_not_bring_their_own() -> None:
    pairs = [
        dataclasses.replace(pair, reference=ReferenceLogps([-1.0] * len(pair.chosen_ids), [-2.0] * len(pair.rejected_ids), own))
        for pair, own in ((PAIR_A, [-3.0, -4.0]), (PAIR_B, [-5.0]))
    ]
    stored = {}
    for companion in COMPANIONS:
        batch = batch_of(pairs, companion, pairs[::-1])
        assert batch.companion is not None
        logps = batch.companion.batch.reference_logps
        stored[companion.name] = None if logps is None else logps.tolist()
        assert (logps is not None) is companion.is_stable_over_epochs
    assert stored == {"mismatched": None, "damaged": [-3.0, -4.0, -5.0]}


@pytest.mark.parametrize("companion", COMPANIONS, ids=lambda companion: companion.name)
def test_a_companion_is_what_it_says_of_itself(companion: Companion) -> None:
    pairs, partners = [PAIR_A, GOOD, PAIR_B], [PAIR_B, PAIR_A, GOOD]
    batch = batch_of(pairs, companion, partners)
    assert batch.companion is not None
    rows = batch.companion.batch
    assert (rows.image_inputs is batch.image_inputs) is companion.shares_images
    with_rows = [row for row, pair in enumerate(pairs) if companion.shares_images or pair.images]
    assert batch.companion.rows.tolist() == with_rows
    assert (REJECTED in rows.segment_ids) is companion.has_rejected
    others = batch_of(pairs, companion, [GOOD, PAIR_B, PAIR_A] if companion.needs_partner else ())
    assert others.companion is not None
    # What is the same whoever the partners are is the same in every epoch.
    unchanged = rows.input_ids.tolist() == others.companion.batch.input_ids.tolist()
    assert unchanged is companion.is_stable_over_epochs is not companion.needs_partner


@pytest.mark.parametrize("companion", COMPANIONS, ids=lambda companion: companion.name)
def test_companions_are_equal_by_kind_and_pickle(companion: Companion) -> None:
    assert pickle.loads(pickle.dumps(companion)) == companion
    assert COMPANIONS[0] != COMPANIONS[1]


def test_needs_say_what_follows_from_the_companion() -> None:
    plain, kto, mdpo = Needs(reference=True), KTO().needs, MDPO().needs
    assert [needs.stable_companion for needs in (plain, kto, mdpo)] == [None, None, Damaged()]
    assert [needs.runs_reference_in_step for needs in (plain, kto, mdpo)] == [False, True, False]
    assert [needs.brings_images for needs in (plain, kto, mdpo)] == [False, False, True]


def test_naming_a_companion_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, rayalign.data.companions; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
