"""The private names that models and processors rely on, so that a release of transformers that changes one is noticed here
first.

A test whose name says that a workaround is still needed fails when the workaround can go.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from torch import nn

from rayalign.models import compat
from tests.tiny_families import PINPOINTS, make_tokenizer
from tests.tiny_models import make_model, make_processor

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WITH_TOWER = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "idefics3", "gemma3", "paligemma")
VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 7}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the hub whose config is in the cache of this machine; its id."""
    cached = tmp_path / "models--someone--tiny"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT / "config.json").write_text('{"model_type": "llava"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return "someone/tiny"


# Configs and classes


def test_settings_are_read_before_a_model_brings_code(tmp_path: Path) -> None:
    settings = {"model_type": "its_own", "auto_map": {"AutoConfig": "its_own.Config"}, "hidden_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert settings.items() <= dict(compat.config_settings(str(tmp_path))).items()


def test_auto_config_still_asks_for_a_models_code_before_it_tells_the_type(tmp_path: Path) -> None:
    settings = {"model_type": "its_own", "auto_map": {"AutoConfig": "its_own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=False)


def test_the_types_of_models_are_told_apart() -> None:
    assert all(compat.is_vision_language(kind) for kind in ("llava", "qwen2_vl", "gemma3", "smolvlm"))
    assert not any(compat.is_vision_language(kind) for kind in ("llama", "qwen2", "bert", "unheard_of"))
    assert all(compat.is_language_model(kind) for kind in ("llama", "qwen2", "mistral"))
    assert not any(compat.is_language_model(kind) for kind in ("llava", "clip", "unheard_of"))


def test_the_class_without_a_head_is_what_the_model_with_one_is_made_of() -> None:
    for family in ("llava", "llava_next", "qwen2_vl", "llama"):
        model = make_model(family)
        assert compat.headless_class(model.config) is type(model.model)


@pytest.mark.parametrize("family", WITH_TOWER)
def test_a_vision_language_model_has_a_tower_beside_its_language_model(family: str) -> None:
    model = make_model(family)
    tower = compat.vision_tower(model)
    assert isinstance(tower, nn.Module)
    assert tower in model.modules()
    assert set(tower.parameters()).isdisjoint(model.get_decoder().parameters())
    assert any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in tower.modules())  # where pixels enter


def test_a_language_model_still_gives_itself_for_its_tower() -> None:
    model = make_model("llama")
    assert model.get_encoder(modality="image") is model
    assert compat.vision_tower(model) is None


# Files


def test_the_revision_of_a_model_is_the_commit_in_the_cache(hub_cache: str) -> None:
    assert compat.hub_revision(hub_cache) == COMMIT


def test_a_file_beside_a_model_may_be_missing(tmp_path: Path) -> None:
    assert compat.read_optional_json(str(tmp_path), "settings.json") is None
    (tmp_path / "settings.json").write_text('{"fps": 2}')
    assert compat.read_optional_json(str(tmp_path), "settings.json") == {"fps": 2}


def test_a_file_of_a_model_of_the_hub_may_be_missing_and_the_hub_away(hub_cache: str) -> None:
    assert compat.read_optional_json(hub_cache, "config.json") == {"model_type": "llava"}
    assert compat.read_optional_json(hub_cache, "settings.json") is None
    assert compat.read_optional_json("nobody/nothing", "settings.json") is None


# Tokenizers

TEXTS = ("Which digit is it? <image>The digit is  two.</s>", "", " ümlaut 猫\n", "<s>USER: a")


def unigram_tokenizer() -> Any:
    """With a normalizer, and a mark before the first word only."""
    words = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz ."), ("▁it", -1.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=0))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def bpe_tokenizer(change: Callable[[Any], None] = lambda tokenizer: None) -> Any:
    tokenizer = make_tokenizer()
    around = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = around
    change(tokenizer)
    return tokenizer


def cut_and_pad(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)


@pytest.mark.parametrize(
    "make",
    [
        bpe_tokenizer,
        unigram_tokenizer,
        functools.partial(bpe_tokenizer, cut_and_pad),
        functools.partial(bpe_tokenizer, lambda tokenizer: setattr(tokenizer, "split_special_tokens", True)),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_ids_alone_are_those_of_a_call(make: Callable[[], Any], special: bool) -> None:
    expected = make()(list(TEXTS), add_special_tokens=special)["input_ids"]
    ids_of = compat.ids_only(make())
    assert ids_of(TEXTS, add_special_tokens=special) == expected
    assert ids_of(TEXTS, add_special_tokens=special) == expected  # after the first call, which may change settings, too


def test_ids_alone_come_from_the_tokenizers_library_and_from_no_tokenizer_with_a_way_of_its_own() -> None:
    class Own(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, *arguments: Any, **options: Any) -> Any:
            return {"input_ids": [[7]]}

    backend = make_tokenizer().backend_tokenizer
    assert compat.ids_only(Own(tokenizer_object=backend))(["a"], add_special_tokens=False) == [[7]]
    usual = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    usual._encode_plus = lambda *arguments, **options: pytest.fail("it was called")
    assert compat.ids_only(usual)(["a cat"], add_special_tokens=False) == [[68, 299]]


# Processors and images


def test_the_processor_of_a_config_is_found_by_its_class() -> None:
    assert compat.processor_class(transformers.LlavaConfig()) is transformers.LlavaProcessor
    assert compat.processor_class(transformers.Qwen2VLConfig()) is transformers.Qwen2VLProcessor
    assert compat.processor_class(transformers.LlamaConfig()) is None


@pytest.mark.parametrize(
    ("name", "has_video"), [("LlavaProcessor", False), ("Qwen2VLProcessor", True), ("InternVLProcessor", True)]
)
def test_processors_with_a_video_part_are_known(name: str, has_video: bool) -> None:
    own: Any = getattr(transformers, name)
    assert compat.has_video_part(own) == has_video
    assert not compat.has_video_part(compat.without_video_part(own))


def save_with_video(folder: Path, settings: dict[str, Any]) -> None:
    """A processor as transformers saves it where it has a video part."""
    make_processor("qwen2_vl").save_pretrained(folder)
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {compat.VIDEO_PART: settings}))


@pytest.mark.skipif(transformers.is_torchvision_available(), reason="with torchvision nothing is missing")
def test_a_processor_with_a_video_part_still_needs_torchvision(tmp_path: Path) -> None:
    save_with_video(tmp_path, VIDEO)
    with pytest.raises(ImportError, match=r"[Tt]orchvision"):
        transformers.Qwen2VLProcessor.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("is_apart", [False, True])
def test_the_settings_of_a_video_part_are_kept_and_saved_again(tmp_path: Path, is_apart: bool) -> None:
    if is_apart:
        make_processor("qwen2_vl").save_pretrained(tmp_path)
        (tmp_path / compat.VIDEO_SETTINGS_FILE).write_text(json.dumps(VIDEO))
    else:
        save_with_video(tmp_path, VIDEO)
    processor = compat.without_video_part(transformers.Qwen2VLProcessor).from_pretrained(str(tmp_path))
    assert type(processor).__name__ == "Qwen2VLProcessor"
    processor.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())[compat.VIDEO_PART] == VIDEO


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl", "gemma3", "idefics3"])
def test_images_alone_are_processed_as_beside_a_text(family: str) -> None:
    processor = make_processor(family)
    image = Image.effect_noise((60, 40), 64).convert("RGB")
    mark = {"qwen2_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"}.get(family, "<image>")
    expected = processor(text=[mark], images=[[image]], return_tensors="pt")["pixel_values"]
    found = processor.image_processor([[image]], **compat.image_options(processor))["pixel_values"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)


def test_the_best_resolution_wastes_least() -> None:
    # What the canvas keeps of the picture first, then what it leaves empty.
    assert compat.best_resolution(28, 56, PINPOINTS) == (28, 56)
    assert compat.best_resolution(60, 20, PINPOINTS) == (56, 28)
    assert compat.best_resolution(300, 310, PINPOINTS) == (56, 56)


@pytest.mark.parametrize("size", [(28, 56), (60, 20), (300, 310), (31, 90)])
def test_the_best_resolution_is_what_the_processor_cuts_into_tiles(size: tuple[int, int]) -> None:
    images = make_processor("llava_next").image_processor
    height, width = compat.best_resolution(*size, PINPOINTS)
    tiles = images([Image.new("RGB", (size[1], size[0]))], return_tensors="pt")["pixel_values"].shape[1]
    assert tiles == 1 + (height // 28) * (width // 28)


RESIZED = [(30, 90), (300, 20), (57, 57), (200, 333)]


@pytest.mark.parametrize("family", ["internvl", "aya_vision"])
def test_tiles_are_counted_as_they_are_cut(family: str) -> None:
    images = make_processor(family).image_processor
    for height, width in RESIZED:
        made = images([np.zeros((height, width, 3), np.uint8)], crop_to_patches=True)["num_patches"]
        assert [compat.number_of_tiles(images, height, width, {"crop_to_patches": True})] == list(made)


@pytest.mark.parametrize(
    ("family", "resize"),
    [
        ("qwen2_vl", compat.qwen_resize),
        ("qwen3_vl", compat.qwen_resize),
        ("glm4v", compat.glm_resize),
        ("glm46v", compat.glm_resize),
    ],
)
def test_grids_of_patches_come_from_the_resized_picture(family: str, resize: Any) -> None:
    images = make_processor(family).image_processor
    limits = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    for height, width in RESIZED:
        made = images([np.zeros((height, width, 3), np.uint8)])["image_grid_thw"][0]
        resized = resize(height, width, factor=images.patch_size * 2, frames=images.temporal_patch_size, **limits)
        assert tuple(side // images.patch_size for side in resized) == tuple(made[1:])


def test_idefics_scales_the_longer_side() -> None:
    assert compat.idefics_resize(30, 90, 56) == (18, 56)
    assert compat.idefics_resize(300, 20, 56) == (56, 4)  # even
    assert compat.idefics_resize(57, 57, 90) == (90, 90)
