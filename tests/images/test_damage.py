"""The damage that mDPO does to images: how little is left, and that nothing but the seed decides what."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rayalign.data.companions import Damaged
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.stream import batch_maker
from rayalign.images.damage import damage_image
from tests.tiny_models import encode_pair, make_policy, noise_image

SIDE = 200
# Bicubic interpolation reads two pixels on either side of the piece.
MARGIN = 4


def places() -> Image.Image:
    """A picture whose pixels tell where they are: red is the column, green the row."""
    row, column = np.mgrid[0:SIDE, 0:SIDE].astype(np.uint8)
    return Image.fromarray(np.stack([column, row, np.zeros_like(row)], axis=-1))


def damage(images: Sequence[Image.Image]) -> list[Image.Image]:
    return [damage_image(image, seed=f"a/{i}") for i, image in enumerate(images)]


def test_a_seed_decides_the_damage_alone() -> None:
    first, again, other = (np.asarray(damage_image(places(), seed=seed)) for seed in ("a/0", "a/0", "a/1"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({damage_image(places(), seed=f"{i}/0").tobytes() for i in range(20)}) == 20


def test_the_damage_is_the_same_today_as_when_a_run_was_started() -> None:
    """An unfinished run is resumed by newer code, and must go on with the same images."""
    pixels = np.asarray(damage_image(places(), seed="train.jsonl:7/0"))
    assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == ([22, 64, 0], [55, 103, 0])  # 3 % of the picture


def test_what_is_left_is_one_to_twenty_percent_of_the_area_in_one_piece_anywhere() -> None:
    areas, lefts, tops, aspects = [], [], [], []
    for i in range(200):
        pixels = np.asarray(damage_image(places(), seed=f"{i}/0")).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        columns, rows = pixels[..., 0], pixels[..., 1]
        width, height = int(np.ptp(columns)), int(np.ptp(rows))
        assert (width - MARGIN) * (height - MARGIN) <= 0.2 * SIDE**2
        assert (width + MARGIN) * (height + MARGIN) >= 0.01 * SIDE**2
        assert 0.75 - 0.3 <= width / height <= 4 / 3 + 0.4  # of pieces 20 pixels wide, MARGIN is a fifth
        # It is a piece of the picture, scaled up: places rise from left to right and from top to bottom.
        assert (np.diff(columns, axis=1) >= 0).all()
        assert (np.diff(rows, axis=0) >= 0).all()
        areas.append(width * height / SIDE**2)
        lefts.append(columns.min() / (SIDE - width))
        tops.append(rows.min() / (SIDE - height))
        aspects.append(width / height)
    # Uniform draws: the mean of 200 is within four standard errors, 4 / sqrt(12 x 200) = 8 % of the range.
    assert abs(np.mean(areas) - 0.105) < 0.08 * 0.19
    assert abs(np.mean(lefts) - 0.5) < 0.08
    assert abs(np.mean(tops) - 0.5) < 0.08
    assert min(aspects) < 0.85
    assert max(aspects) > 1.2
    assert np.corrcoef(lefts, tops)[0, 1] == pytest.approx(0, abs=0.3)  # four standard errors: 4 / sqrt(200)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 200), (200, 3), (2, 2), (641, 479)])
def test_a_picture_of_any_size_keeps_its_size(size: tuple[int, int]) -> None:
    given = Image.new("RGB", size, (10, 200, 30))
    for i in range(20):
        damaged = damage_image(given, seed=f"{i}/0")
        assert (damaged.size, damaged.mode) == (size, "RGB")
        assert damaged.getcolors() == [(size[0] * size[1], (10, 200, 30))]


def test_the_picture_given_is_left_as_it_was() -> None:
    given = places()
    damage_image(given, seed="a/0")
    assert given.tobytes() == places().tobytes()


SIZES = [(40, 30), (20, 60), (1, 1), (3, 200), (120, 90)]


@pytest.mark.parametrize("max_pixels", [None, 500])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_damaged_images_make_as_many_features_as_true_ones(
    model_folder: Callable[..., Path], family: str, max_pixels: int | None
) -> None:
    spec = EncoderSpec(str(model_folder(family)), responses="both", max_pixels=max_pixels)
    for number, (width, height) in enumerate(SIZES):
        content = noise_image(width, height, seed=number)
        true = image_processing(spec)([content], [True])
        damaged = image_processing(spec)([content], [True], damage)
        shapes = [{name: value.shape for name, value in images.tensors.items()} for images in (true, damaged)]
        assert shapes[0] == shapes[1]
        assert true.lengths == damaged.lengths
        assert (width, height) == (1, 1) or not torch.equal(true.tensors["pixel_values"], damaged.tensors["pixel_values"])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_pair_gets_the_same_damage_alone_as_in_any_company(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    red, blue = noise_image(40, 30, seed=1), noise_image(40, 30, seed=2)
    pairs = [
        encode_pair(folder, "a", "Which?", "two", "cat", images=[red]),
        encode_pair(folder, "b", "It?", "yes", "no"),
        encode_pair(folder, "c", "Which?", "cat", "two", images=[blue, red]),
    ]
    make = batch_maker(EncoderSpec(str(folder), responses="both"), Damaged())
    policy = make_policy(folder)

    def features(*numbers: int) -> dict[tuple[str, int], Tensor]:
        """The features of each damaged image, by pair and place."""
        companion = make([pairs[n] for n in numbers], ()).companion
        assert companion is not None
        found = policy.image_features(companion.batch)
        places = [(pairs[n].id, i) for n in numbers for i in range(len(pairs[n].images))]
        return {place: found[slot] for place, slot in zip(places, companion.batch.image_slots, strict=True)}

    whole = features(0, 1, 2)
    assert whole.keys() == {("a", 0), ("c", 0), ("c", 1)}
    for company in ((0,), (2,), (2, 0), (1, 2)):
        for place, value in features(*company).items():
            # The vision tower's sums over a batch of another size differ in the last bits of float32.
            torch.testing.assert_close(value, whole[place], atol=1e-4, rtol=1e-4)
    # Red is damaged in two ways.
    assert (whole["a", 0] - whole["c", 1]).abs().max() > 1e-2


def test_pictures_that_are_not_rgb_are_damaged_as_they_are_shown(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")
    file = io.BytesIO()
    places().convert("P").save(file, "GIF")
    true = image_processing(spec)([file.getvalue()], [True]).tensors["pixel_values"]
    damaged = image_processing(spec)([file.getvalue()], [True], damage).tensors["pixel_values"]
    assert true.shape == damaged.shape
    assert not torch.equal(true, damaged)
