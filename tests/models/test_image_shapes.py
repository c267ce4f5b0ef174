"""What is told of images from their sizes is what the processor writes that resizes them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import transformers
from PIL import Image

from rayalign.models.image_shapes import RULES, Size, shape_processor
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_models import make_processor

# Around the tiny models' tiles and patches, and from a line of pixels to long strips.
SIDES = (1, 3, 9, 27, 28, 43, 57, 100, 333)
SIZES = [(height, width) for height in SIDES for width in SIDES]
LONG = [(2, 900), (700, 4), (500, 90), (31, 800), (800, 600)]
SEVERAL = [[(28, 56), (9, 100)], [(43, 43), (43, 43)], [(100, 2), (57, 28), (333, 84)]]


def mark_of(processor: Any) -> str:
    return getattr(processor, "image_token", None) or "<image>"


def ids_of(write: Callable[[], Any]) -> list[int] | str:
    """Token ids, or the error in their place."""
    try:
        ids: list[int] = write()["input_ids"][0].tolist()
    except ValueError as error:
        return str(error)
    return ids


def assert_same_ids(processor: Any, samples: Sequence[Sequence[Size]]) -> None:
    mark = mark_of(processor)
    by_shape = shape_processor(processor, mark)
    assert by_shape is not None
    found = set()
    for sizes in samples:
        prompt = "USER: " + f"{mark}\n" * len(sizes) + "Which digit is it?"
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        options = {"text": [prompt], "images": [images], "add_special_tokens": False, "return_tensors": "np"}
        expected = ids_of(functools.partial(processor, **options))
        assert ids_of(functools.partial(by_shape, prompt, sizes, add_special_tokens=False)) == expected, sizes
        found.add(len(expected))
    assert len(found) > 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_prompt_written_by_sizes_is_the_one_that_the_processor_writes(family: str) -> None:
    assert_same_ids(make_processor(family), [*([size] for size in (*SIZES, *LONG)), *SEVERAL])


@pytest.mark.parametrize("longest", [50, 90])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_pictures_are_cut_into_whole_tiles_whatever_they_are_scaled_to(family: str, longest: int) -> None:
    processor = make_processor(family)
    processor.image_processor.size = {"longest_edge": longest}
    assert_same_ids(processor, [*([size] for size in SIZES[::3]), *SEVERAL])
    processor.image_processor.do_image_splitting = False
    assert_same_ids(processor, [[(28, 56)], *SEVERAL])


def test_every_rule_is_tested() -> None:
    kinds = {type(make_processor(family).image_processor).__name__.removesuffix("Pil") for family in TINY_FAMILIES}
    assert kinds == set(RULES)


def keep_sizes(processor: Any) -> None:
    processor.image_processor.do_resize = False


def keep_proportions(processor: Any) -> None:
    processor.image_processor.do_center_crop = False


def take_another_kind(processor: Any) -> None:
    processor.image_processor = transformers.ViTImageProcessorPil(size={"height": 28, "width": 28})


def take_own_kind(processor: Any) -> None:
    own = type("CLIPImageProcessor", (type(processor.image_processor),), {"__module__": "transformers_modules.own"})
    processor.image_processor.__class__ = own


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2_vl", keep_sizes),
        ("idefics3", keep_sizes),
        ("llava", keep_proportions),
        ("llava", take_another_kind),
        ("llava", take_own_kind),
        ("llama", lambda processor: None),
    ],
)
def test_nothing_is_told_of_processors_and_settings_without_a_rule(family: str, change: Callable[[Any], None]) -> None:
    processor = make_processor(family)
    change(processor)
    assert shape_processor(processor, mark_of(processor)) is None


def test_a_processor_and_its_image_processor_stay_as_they_are() -> None:
    processor = make_processor("llava")
    images = processor.image_processor
    by_shape = shape_processor(processor, "<image>")
    assert by_shape is not None
    by_shape("<image>", [(8, 8)], add_special_tokens=False)
    assert processor.image_processor is images
