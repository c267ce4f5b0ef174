"""Held-out pairs with the pictures of other records: whose pictures they get, and what stands in the batch then."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rayalign.data.batch import ImageChange, PairBatch, assemble
from rayalign.data.reference_store import ReferenceLogps
from rayalign.data.shuffled_pictures import Pictures, shuffle_pictures, with_pictures_of
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import open_image
from rayalign.models.family import ImageInputs, RowLayout
from tests.tiny_models import noise_image

WIDE, TALL = (40, 30), (30, 40)


def one(name: str, size: tuple[int, int] = WIDE) -> Pictures:
    return Pictures((name,), (size,))


def test_each_row_gets_pictures_of_another_record_that_has_as_many() -> None:
    seen = {row: one(f"picture {row}") for row in range(10)}
    seen |= {row: Pictures((f"first {row}", f"second {row}"), (WIDE, TALL)) for row in (20, 21, 22)}
    partners = shuffle_pictures(seen, seed=0)
    assert partners.keys() == seen.keys()
    assert all(row != other and len(seen[row].hashes) == len(seen[other].hashes) for row, other in partners.items())


def test_a_row_never_gets_a_picture_of_its_own_back() -> None:
    # Four questions are asked of every picture.
    seen = {row: one(f"picture {row // 4}") for row in range(40)}
    partners = shuffle_pictures(seen, seed=1)
    assert partners.keys() == seen.keys()
    assert all(seen[row].hashes != seen[other].hashes for row, other in partners.items())


def test_pictures_of_the_same_size_come_before_any_other() -> None:
    seen = {row: one(f"picture {row}", WIDE if row % 2 else TALL) for row in range(20)}
    seen[30] = one("picture 30", (7, 7))
    partners = shuffle_pictures(seen, seed=2)
    assert all(seen[row].sizes == seen[partners[row]].sizes for row in range(20))
    assert partners[30] in range(20)  # no other picture is as large


def test_rows_without_pictures_and_rows_that_all_show_the_same_have_no_partner() -> None:
    seen = {0: Pictures((), ()), 1: one("same"), 2: one("same"), 3: Pictures(("same", "other"), (WIDE, WIDE))}
    assert shuffle_pictures(seen, seed=0) == {}


def test_partners_depend_on_the_seed_and_not_on_the_order_in_which_workers_saw_the_rows() -> None:
    seen = {row: one(f"picture {row}") for row in range(50)}
    assert shuffle_pictures(seen, seed=0) == shuffle_pictures(dict(reversed(seen.items())), seed=0)
    assert shuffle_pictures(seen, seed=0) != shuffle_pictures(seen, seed=1)


RED, BLUE, GREEN = (noise_image(*size, seed=seed) for seed, size in enumerate((WIDE, WIDE, TALL)))
PAIR_A = EncodedPair("a", [5, 6], [7, 2], [8], [RED], ["red"], reference=ReferenceLogps([0.0, 0.0], [0.0], []))
PAIR_B = EncodedPair("b", [4], [9], [7, 2], [BLUE, RED], ["blue", "red"])


def pixels(contents: Sequence[bytes], alone: Sequence[bool], change: ImageChange | None = None) -> ImageInputs:
    opened = [open_image(content) for content in contents]
    changed = opened if change is None else change(opened)
    return ImageInputs({f"pixels {i}": _array(image) for i, image in enumerate(changed)})


def _array(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def shuffled(
    pairs: Sequence[EncodedPair], others: Sequence[EncodedPair], *, by_company: bool = False, max_pixels: int | None = None
) -> PairBatch:
    layout = RowLayout(pad_token_id=0, features_by_company=by_company)
    return with_pictures_of(pairs, others, layout=layout, process_images=pixels, max_pixels=max_pixels)


@pytest.mark.parametrize("by_company", [False, True])
def test_the_batch_is_that_of_the_pairs_but_for_the_pictures_which_have_the_own_ones_sizes(by_company: bool) -> None:
    others = [
        dataclasses.replace(PAIR_A, images=[GREEN], image_hashes=["green"]),
        dataclasses.replace(PAIR_B, images=[RED, GREEN], image_hashes=["red", "green"]),
    ]
    pairs = [PAIR_A, PAIR_B]
    batch = shuffled(pairs[::-1], others[::-1], by_company=by_company)
    without_reference = [dataclasses.replace(pair, reference=None) for pair in pairs[::-1]]
    plain = assemble(without_reference, layout=RowLayout(pad_token_id=0), process_images=pixels)
    for name in ("input_ids", "segment_ids", "targets", "response_ids", "last_token"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert batch.ids == ("b", "a")
    squeezed = open_image(GREEN).resize(WIDE, Image.Resampling.BICUBIC)
    expected = [open_image(RED), squeezed, squeezed]  # b's two, then a's, in reading order
    found = [batch.image_inputs[f"pixels {slot}"] for slot in batch.image_slots]
    assert all(torch.equal(image, _array(one)) for image, one in zip(found, expected, strict=True))


def test_the_own_pictures_size_is_the_one_after_max_pixels() -> None:
    other = dataclasses.replace(PAIR_A, images=[GREEN], image_hashes=["green"])
    batch = shuffled([PAIR_A], [other], max_pixels=300)
    assert batch.image_inputs["pixels 0"].shape[:2] == _array(open_image(RED, max_pixels=300)).shape[:2] != WIDE[::-1]


def test_stored_log_probs_of_the_reference_are_left_out_because_they_are_of_the_own_pictures() -> None:
    assert shuffled([PAIR_A], [dataclasses.replace(PAIR_A, images=[BLUE])]).reference_logps is None
