"""What --model, --model_type and --adapter mean together."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from rayalign.config.sections import ModelConfig
from rayalign.models import missing
from rayalign.models.source import ModelSource, require_model, resolve_model

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
        (base / "none", f"there is no such folder (looked for {base}/none)."),
        (base, "the folder has no adapter_config.json, so it is no adapter of peft."),
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


def refusal(**named: str) -> str:
    """The sentence for a model that is not there."""
    with pytest.raises(ValueError) as caught:
        require_model(ModelConfig(**named), REGISTERED)
    return str(caught.value)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: runs/sft_full/model is a model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "sft_full" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_model_that_is_there_is_found_by_any_spelling_of_its_folder(runs: Path) -> None:
    whole = str(runs / "runs/sft_full/model")
    for named in (whole, "runs/sft_full/model", "./runs/sft_full/model/"):
        assert require_model(ModelConfig(model=named), REGISTERED) == ModelSource(whole)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("runs/sft_ful/model", "there is no such folder (looked for {runs}/runs/sft_ful/model). {meant}"),
        ("./runs/sft_full/modle", "there is no such folder (looked for {runs}/runs/sft_full/modle). {meant}"),
        ("run/sft_full/model", "there is no such folder (looked for {runs}/run/sft_full/model). {meant}"),
        ("../nowhere/at/all", "there is no such folder (looked for {runs}/../nowhere/at/all)."),
        ("runs/sft_full/model/config.json", "is a file, and a model is a folder. {meant}"),
        ("runs/sft_full", "the folder has no config.json. {meant}"),
        ("empty", "the folder has no config.json, so it is no model of transformers (it is empty)."),
        ("gguf", "the folder has no config.json, and GGUF files can't be trained: give the model that they were made from."),
        (
            "bare",
            "the folder has a config.json and no weights (*.safetensors or *.bin). Copy them beside it; a download that was "
            "cut short goes on when it is started again.",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_the_one_that_is_near(runs: Path, named: str, words: str) -> None:
    for folder in ("empty", "gguf", "bare"):
        (runs / folder).mkdir()
    (runs / "gguf" / "model.Q4.gguf").write_bytes(b"")
    (runs / "bare" / "config.json").write_text("{}")
    meant = "Did you mean runs/sft_full/model?"
    assert refusal(model=named) == f"--model {named}: {words.format(runs=runs, meant=meant)}"


def test_a_mistyped_adapter_is_refused_with_the_one_that_is_near(runs: Path, base: Path) -> None:
    make_adapter(runs / "adapter", str(base))
    assert refusal(adapter="adaptor") == (
        f"--adapter adaptor: there is no such folder (looked for {runs}/adaptor). Did you mean adapter?"
    )


def test_an_adapter_whose_model_is_gone_names_both(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "/gone/llava")
    for named in ({"adapter": str(adapter)}, {"model": str(adapter)}):
        assert refusal(**named) == (
            f"{adapter} is an adapter of the model /gone/llava: there is no such folder (looked for /gone/llava)."
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{",
            "is damaged or cut off (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). "
            "Copy it again from where the adapter was made.",
        ),
        (
            '{"peft_type": "LORA"}',
            "names no base model. Write the model's folder or hub id there, as base_model_name_or_path.",
        ),
    ],
)
def test_a_damaged_description_of_an_adapter_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert refusal(adapter=str(tmp_path)) == f"{tmp_path}/adapter_config.json: {words}"


def test_a_hub_model_that_is_not_at_hand_offline_is_refused_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name-7b").mkdir(parents=True)
    cache = missing.constants.HF_HUB_CACHE
    tried = f"there is no such folder here and no such model in {cache}, and HF_HUB_OFFLINE is set, so the hub was not asked."
    helps = (
        "Where there is no connection, give a folder with the model's files, or run `hf download {}` where there is one, copy "
        "that cache to every node, and set HF_HUB_OFFLINE=1."
    )
    assert refusal(model="some/model") == f"--model some/model: {tried} {helps.format('some/model')}"
    near = f"{HUB_ID}s"
    assert refusal(model=near) == f"--model {near}: {tried} Did you mean {HUB_ID}? {helps.format(near)}"
    assert refusal(model="owner/nam-7b").startswith(f"--model owner/nam-7b: {tried} Did you mean owner/name-7b?")
    name = next(iter(REGISTERED))
    assert refusal(model_type=name).startswith(f"--model_type {name} ({HUB_ID}): {tried}")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            errors.GatedRepoError,
            "the hub gives this model only to those who agreed to its terms. Agree on https://huggingface.co/some/model, then "
            "log in with `hf auth login`, or set HF_TOKEN on every node.",
        ),
        (
            errors.RepositoryNotFoundError,
            "there is no such folder here and no such model on https://huggingface.co. If it is a private one, log in with "
            "`hf auth login`, or set HF_TOKEN on every node.",
        ),
        (errors.RemoteEntryNotFoundError, "the hub's model has no config.json, so it is no model of transformers."),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, error: type[errors.HfHubHTTPError], words: str
) -> None:
    def answer(model: str, file: str) -> None:
        raise OSError("You are trying to access a gated repo.") from error.__new__(error)  # made whole, it asks for a response

    monkeypatch.setattr(missing, "cached_file", answer)
    assert refusal(model="some/model") == f"--model some/model: {words}"


def test_a_name_that_no_hub_id_can_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(model="my model") == "--model my model: there is no such folder, and a hub id looks like OWNER/NAME."
    assert refusal(model="a:b").startswith("--model a:b: there is no such folder")


@pytest.fixture
def remote(bucket: Path) -> Path:
    """The folder that `s3://bucket` means: `base` is a model, `adapter` an adapter of it."""
    (bucket / "base").mkdir()
    (bucket / "base" / "config.json").write_text("{}")
    (bucket / "base" / "model.safetensors").write_bytes(b"weights")
    make_adapter(bucket / "adapter", "s3://bucket/base/")
    return bucket


def test_a_model_or_adapter_may_be_a_url_and_keeps_it_as_its_name(remote: Path, tmp_path: Path) -> None:
    base, both = ModelSource("s3://bucket/base"), ModelSource("s3://bucket/base", "s3://bucket/adapter")
    for named in ("s3://bucket/base", "s3://bucket/base/"):
        assert require_model(ModelConfig(model=named), {}) == base
    for flags in (
        {"model": "s3://bucket/adapter"},
        {"adapter": "s3://bucket/adapter/"},
        {"model": "s3://bucket/base", "adapter": "s3://bucket/adapter"},
    ):
        assert require_model(ModelConfig(**flags), {}) == both
    here = both.here()
    assert (Path(here.base) / "model.safetensors").read_bytes() == b"weights"
    assert here.adapter is not None
    assert Path(here.adapter).is_relative_to(tmp_path / "downloads")
    assert here.here() == here


def test_a_file_url_is_the_folder_that_it_names(base: Path, adapter: Path) -> None:
    expected = ModelSource(str(base), str(adapter))
    assert resolve_model(ModelConfig(model=f"file://{base}", adapter=f"file://{adapter}"), {}) == expected
    assert resolve_model(ModelConfig(model=f"file://{adapter}"), {}) == expected
    assert refusal(model="file:///gone") == "--model file:///gone: there is no such folder (looked for /gone)."


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": "s3://bucket/gone"}, "--model s3://bucket/gone: there is no such folder, or nothing in it."),
        ({"adapter": "s3://bucket/gone"}, "--adapter s3://bucket/gone: there is no such folder, or nothing in it."),
        (
            {"model": "s3://bucket/run"},
            "--model s3://bucket/run: the folder has no config.json, so it is no model of transformers. Did you mean "
            "s3://bucket/run/model?",
        ),
        (
            {"model": "s3://bucket/bare"},
            "--model s3://bucket/bare: the folder has a config.json and no weights (*.safetensors or *.bin). Copy them beside "
            "it; a download that was cut short goes on when it is started again.",
        ),
        (
            {"adapter": "s3://bucket/base"},
            "--adapter s3://bucket/base: the folder has no adapter_config.json, so it is no adapter of peft.",
        ),
        (
            {"model": "s3://bucket/of_gone"},
            "s3://bucket/of_gone is an adapter of the model s3://bucket/gone: there is no such folder, or nothing in it.",
        ),
        (
            {"model": "s3://bucket/bare", "adapter": "s3://bucket/adapter"},
            "--adapter s3://bucket/adapter: was made for the model s3://bucket/base, not for s3://bucket/bare. Give that "
            "model, or, where both hold the same weights, correct base_model_name_or_path in its adapter_config.json.",
        ),
        (
            {"adapter": "s3://bucket/ia3"},
            "s3://bucket/ia3: is an adapter of the type IA3, and only LoRA is supported. Merge it into its model first.",
        ),
        (
            {"adapter": "s3://bucket/damaged"},
            "s3://bucket/damaged/adapter_config.json: holds no settings of an adapter. Copy it again from where the adapter "
            "was made.",
        ),
    ],
)
def test_a_remote_folder_that_is_no_model_is_refused_in_words(remote: Path, flags: dict[str, str], words: str) -> None:
    for name in ("bare", "run/model", "damaged"):
        (remote / name).mkdir(parents=True)
    (remote / "run" / "summary.json").write_text("{}")
    for name in ("bare", "run/model"):
        (remote / name / "config.json").write_text("{}")
    make_adapter(remote / "of_gone", "s3://bucket/gone")
    make_adapter(remote / "ia3", "s3://bucket/base", peft_type="IA3")
    (remote / "damaged" / "adapter_config.json").write_text("[]")
    assert refusal(**flags) == words
