"""The check of models that no file of the shelf describes: it admits those that the common path computes right, no others."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rayalign.ops.attention
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord, RecordError
from rayalign.models.registry import FAMILIES, REGISTERED_MODELS, find_family
from rayalign.policy.forward_check import check_forward
from rayalign.policy.policy import Policy
from tests.tiny_families import NOT_ON_THE_SHELF, TEXT, TINY_FAMILIES, TINY_TEXT_MODELS, TinyFamily
from tests.tiny_models import make_policy, noise_image, save_model

UNKNOWN = (
    "are none of those that are supported for certain, and this one can't be trained in the common way: {reason}. Supported: "
    f"{', '.join(sorted(FAMILIES))}."
)


def check(folder: Path) -> Policy:
    policy = make_policy(folder)
    check_forward(policy, EncoderSpec(str(folder), responses="both"))
    return policy


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        check(folder)
    return str(caught.value)


def language_model(name: str, **settings: Any) -> TinyFamily:
    processor = TINY_TEXT_MODELS["llama"].processor
    return TinyFamily(processor, lambda processor, text: transformers.AutoConfig.for_model(name, **{**TEXT, **settings}))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_of_the_shelf_passes(model_folder: Callable[..., Path], family: str) -> None:
    policy = check(model_folder(family))
    assert policy.base.get_decoder().training


def test_a_vision_language_model_that_is_not_on_the_shelf_is_admitted(tmp_path: Path) -> None:
    save_model(tmp_path, NOT_ON_THE_SHELF)
    assert "vipllava" not in FAMILIES
    assert check(tmp_path).family.image_token_counts is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mixtral", "olmo2", "gpt_neox"])
def test_language_models_are_admitted(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, language_model(name))
    assert check(tmp_path).family.text_only


def test_a_model_that_the_common_path_gets_wrong_is_refused_with_the_difference(tmp_path: Path) -> None:
    # Its logits are scaled down after the head, which the common path does not know of.
    save_model(tmp_path, language_model("granite", logits_scaling=2.0))
    words = refusal(tmp_path)
    reason = re.search("beside the other response the chosen one has a log-probability that is off by [0-9.]+ a token", words)
    assert reason is not None
    assert words == f"Models of type 'granite' {UNKNOWN.format(reason=reason[0])}"


def test_a_model_with_recurrent_layers_is_refused_by_their_name(tmp_path: Path) -> None:
    layers = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    save_model(tmp_path, language_model("lfm2", **layers))
    assert refusal(tmp_path) == (
        "The language model has layers of type conv, in which two responses in one row can't be kept apart. Models whose "
        "layers are full_attention or sliding_attention can be trained."
    )


def test_a_leak_into_the_other_response_is_noticed_in_bfloat16(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = rayalign.ops.attention.attention_mask
    monkeypatch.setattr(rayalign.ops.attention, "attention_mask", lambda s, p, **options: honest(s.clamp(max=1), p, **options))
    policy = make_policy(model_folder("llama"))
    policy.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"(moves by|is off by) .* a token"):
        check_forward(policy, EncoderSpec(str(model_folder("llama")), responses="both"))


def test_a_type_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        find_family("resnet")
    assert str(caught.value) == (
        "Models of type 'resnet' can't be trained: transformers knows them neither as vision-language models nor as language "
        f"models. Supported for certain: {', '.join(sorted(FAMILIES))}."
    )


def test_a_model_in_its_makers_own_format_is_refused_before_its_code_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "own_code.Config"}}')
    with pytest.raises(ValueError) as caught:
        _ = EncoderSpec(str(tmp_path), responses="both").model_config
    assert str(caught.value) == (
        "Models of type 'internvl_chat' can't be trained: it is InternVL's own format. transformers has a port (`internvl`): "
        "take a model whose id ends in -hf, such as OpenGVLab/InternVL3-2B-hf, or convert this one with "
        "convert_internvl_weights_to_hf.py of transformers' repository and pass the folder as --model."
    )


def test_a_language_model_drops_records_with_images(model_folder: Callable[..., Path]) -> None:
    encoder = Encoder(EncoderSpec(str(model_folder("llama")), responses="both"))
    image = noise_image(20, 20)
    message = Message(role="user", content=f"{IMAGE_MARK}What?")
    record = PreferenceRecord(id="r", messages=(message,), images=(image,), chosen="a", rejected="b")
    with pytest.raises(RecordError) as caught:
        encoder.encode(record, [image])
    assert caught.value.reason == "images for a text model"


def test_the_names_of_the_guide_are_registered() -> None:
    assert REGISTERED_MODELS["llava1_6-mistral-7b-instruct"] == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert REGISTERED_MODELS["internvl2-2b"] == "OpenGVLab/InternVL2-2B"


def test_no_name_is_registered_twice() -> None:
    assert len(REGISTERED_MODELS) == sum(len(family.registered) for family in FAMILIES.values())


def test_every_family_of_the_shelf_is_tested_at_toy_size() -> None:
    untested = {"mistral3"}  # its processor needs torchvision
    assert set(TINY_FAMILIES) == set(FAMILIES) - untested
