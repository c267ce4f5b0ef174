"""What --model, --model_type and --adapter mean together."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayalign.config.sections import ModelConfig
from rayalign.models.source import ModelSource, resolve_model

REGISTERED = {"llava1_6-mistral-7b-instruct": "llava-hf/llava-v1.6-mistral-7b-hf"}
HUB_ID = "llava-hf/llava-v1.6-mistral-7b-hf"


def make_adapter(folder: Path, base: str, **config: Any) -> Path:
    folder.mkdir()
    words = {"peft_type": "LORA", "base_model_name_or_path": base, "bias": "none", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps({**words, **config}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", str(base))


def test_an_adapter_brings_its_model_and_may_be_named_with_it_or_alone(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ModelSource(str(base), str(adapter))
    assert resolve_model(ModelConfig(model=str(adapter)), {}) == expected
    assert resolve_model(ModelConfig(adapter=str(adapter)), {}) == expected
    assert resolve_model(ModelConfig(model=str(base), adapter=str(adapter)), {}) == expected
    monkeypatch.chdir(base.parent)
    assert resolve_model(ModelConfig(model="base", adapter="./adapter"), {}) == expected
    assert resolve_model(ModelConfig(model=str(base)), {}) == ModelSource(str(base))


def test_an_adapter_of_a_hub_model_fits_its_id_and_its_registered_name(tmp_path: Path) -> None:
    adapter = str(make_adapter(tmp_path / "adapter", HUB_ID))
    for named in (ModelConfig(model=HUB_ID, adapter=adapter), ModelConfig(model_type=next(iter(REGISTERED)), adapter=adapter)):
        assert resolve_model(named, REGISTERED) == ModelSource(HUB_ID, adapter)


def test_an_adapter_of_another_model_is_refused_with_both_names(base: Path, adapter: Path) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_model(ModelConfig(model=HUB_ID, adapter=str(adapter)), {})
    assert str(caught.value) == (
        f"--adapter {adapter}: was made for the model {base}, not for {HUB_ID}. Give that model, or, where both hold the same "
        "weights, correct base_model_name_or_path in its adapter_config.json."
    )


def test_two_adapters_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = make_adapter(tmp_path / "other", str(base))
    with pytest.raises(ValueError) as caught:
        resolve_model(ModelConfig(model=str(adapter), adapter=str(other)), {})
    assert str(caught.value) == f"--model {adapter} is an adapter, too, and --adapter {other} another: give one of them."


def test_folders_without_an_adapter_are_refused(base: Path) -> None:
    for folder, problem in (
        (base / "none", "there is no such folder."),
        (base, "the folder has no adapter_config.json, so it is no adapter."),
    ):
        with pytest.raises(ValueError) as caught:
            resolve_model(ModelConfig(model=str(base), adapter=str(folder)), {})
        assert str(caught.value) == f"--adapter {folder}: {problem}"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the type IA3, and only LoRA is supported."),
        (
            {"modules_to_save": ["lm_head"], "bias": "all"},
            "is an adapter with modules_to_save and bias beside LoRA's matrices, which can't be turned off for the reference.",
        ),
        (
            {"trainable_token_indices": [5]},
            "is an adapter with trainable_token_indices beside LoRA's matrices, which can't be turned off for the reference.",
        ),
    ],
)
def test_adapters_that_are_more_or_other_than_lora_are_refused(
    tmp_path: Path, base: Path, config: dict[str, Any], problem: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(base), **config)
    for named in (ModelConfig(model=str(adapter)), ModelConfig(adapter=str(adapter))):
        with pytest.raises(ValueError) as caught:
            resolve_model(named, {})
        assert str(caught.value) == f"{adapter}: {problem} Merge it into its model first."
