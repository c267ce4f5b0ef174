"""The export of a reward model: one folder in sequence-classification form, with the scores that training gave it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from rayalign.algorithms import RM
from rayalign.config import command_line
from rayalign.config.sections import TunerConfig
from rayalign.config.serving import ExportConfig
from rayalign.images.fetch import open_image
from rayalign.models.source import ModelSource
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.serving.export import load_sequence_classifier, run, sequence_classifier_class, write_sequence_classifier
from rayalign.serving.model_card import write_card
from rayalign.storage import Store
from tests.tiny_models import FAMILIES, encode_pair, make_batch, make_policy, make_processor, noise_image, wake_adapters

# float32 through two layers, and adapters merged into the weights, whose sums are rounded anew; scores are near 1.
MERGED = 2e-5

REPOSITORY = Path(__file__).parents[2]
RED, BLUE = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
QUESTION = "Which digit is it?"
ANSWERS = ("The digit is two.", "a cat")
IMAGES: dict[str, list[tuple[bytes, ...]]] = {
    "no image": [(), ()],
    "one image": [(RED,), (BLUE,)],
    "two images": [(RED, BLUE), (BLUE, BLUE)],
    "0 to 2 images": [(RED, BLUE), (), (BLUE,)],
}


def reward_model(folder: Path, run: Path, sft_type: Any = "lora") -> tuple[ModelSource, Policy]:
    """A reward model as a run leaves it, and the policy that was trained."""
    tuner = TunerConfig(sft_type=sft_type, lora_target_modules=("ALL",))
    policy = wake_adapters(make_policy(folder, needs=RM().needs, tuner=tuner))
    save_policy(policy, run)
    AutoProcessor.from_pretrained(folder).save_pretrained(run)
    return ModelSource(str(run)) if sft_type == "full" else ModelSource(str(folder), adapter=str(run)), policy


def expected_scores(policy: Policy, folder: Path, images: Sequence[Sequence[bytes]]) -> Tensor:
    """[rows] as training scores them."""
    pairs = [encode_pair(folder, str(i), QUESTION, *ANSWERS, images=own) for i, own in enumerate(images)]
    batch = make_batch(folder, pairs)
    with torch.no_grad():
        chosen, rejected = policy.values(batch, policy.image_features(batch))
    return torch.stack([chosen, rejected], dim=1).flatten()


def scores(
    model: Any, export: Path, images: Sequence[Sequence[bytes]], *, side: str = "right", answers: Sequence[str] = ANSWERS
) -> Tensor:
    """[rows] of a whole batch, as transformers gives them with nothing but the exported folder."""
    processor = AutoProcessor.from_pretrained(export)
    tokenizer = processor.tokenizer
    rows, pictures = [], []
    for own in images:
        question = [*({"type": "image"} for _ in own), {"type": "text", "text": QUESTION}]
        prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        opened = [open_image(content) for content in own]
        prompt_ids = processor(text=[prompt], images=opened or None, add_special_tokens=False)["input_ids"][0]
        for answer in answers:
            rows.append([*prompt_ids, *tokenizer(answer + tokenizer.eos_token)["input_ids"]])
            pictures += opened
    if len(rows) > 1:
        inputs = dict(tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt"))
    else:
        inputs = {"input_ids": torch.tensor(rows)}
    if pictures:
        inputs |= processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    assert logits.shape == (len(rows), 1)
    return logits.squeeze(1)


@pytest.fixture
def registered() -> Iterator[Callable[[Any], None]]:
    """`registered(config)`: AutoModelForSequenceClassification knows the config's class until the test ends."""
    mapping = AutoModelForSequenceClassification._model_mapping._extra_content
    before = dict(mapping)

    def register(config: Any) -> None:
        # Without exist_ok transformers leaves its own configs' classes unregistered, silently.
        AutoModelForSequenceClassification.register(type(config), sequence_classifier_class(config), exist_ok=True)

    yield register
    mapping.clear()
    mapping.update(before)


@pytest.fixture(scope="module")
def exports(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`exports(family, sft_type)`: (model folder, policy, folder of its export), each made once."""
    made: dict[tuple[str, str], tuple[Path, Policy, Path]] = {}

    def make(family: str, sft_type: str = "lora") -> tuple[Path, Policy, Path]:
        if (family, sft_type) not in made:
            root, folder = tmp_path_factory.mktemp("reward"), model_folder(family)
            source, policy = reward_model(folder, root / "model", sft_type)
            write_sequence_classifier(source, root / "export")
            made[family, sft_type] = folder, policy, root / "export"
        return made[family, sft_type]

    return make


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("sft_type", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_gives_the_scores_of_training(
    exports: Callable[..., Any], family: str, sft_type: str, case: str, side: str
) -> None:
    folder, policy, export = exports(family, sft_type)
    expected = expected_scores(policy, folder, IMAGES[case])
    torch.testing.assert_close(
        scores(load_sequence_classifier(export), export, IMAGES[case], side=side), expected, atol=MERGED, rtol=0
    )
    assert (expected[::2] - expected[1::2]).abs().min() > 1e-2  # the two answers of every question


PRETRAINED = {"llava": LlavaPreTrainedModel, "llava_next": LlavaNextPreTrainedModel}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_ways_of_loading_give_the_same_scores(
    exports: Callable[..., Any], registered: Callable[[Any], None], family: str
) -> None:
    folder, policy, export = exports(family)
    expected = expected_scores(policy, folder, IMAGES["0 to 2 images"])
    own: Any = type("Scorer", (GenericForSequenceClassification, PRETRAINED[family]), {})
    registered(AutoConfig.from_pretrained(export))
    for model_class in (own, AutoModelForSequenceClassification):
        model, report = model_class.from_pretrained(export, output_loading_info=True)
        assert {name: set(keys) for name, keys in report.items()} == {name: set() for name in report}
        torch.testing.assert_close(scores(model, export, IMAGES["0 to 2 images"]), expected, atol=MERGED, rtol=0)


def test_nothing_is_registered_unasked(exports: Callable[..., Any]) -> None:
    _, _, export = exports("llava")
    load_sequence_classifier(export)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(export)


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("prefix", ["", "vision_model."], ids=["new names", "the hub's names"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_the_names_of_the_base_model_s_files(
    model_folder: Callable[..., Path], tmp_path: Path, family: str, prefix: str
) -> None:
    folder = tmp_path / "base"
    weights = load_file(model_folder(family) / "model.safetensors")
    folder.mkdir()
    for file in model_folder(family).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    # Models on the hub, and vLLM, have one part more in the vision tower's names than transformers 5.23 gives a new model.
    weights = {name.replace("vision_tower.", f"vision_tower.{prefix}"): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source, _ = reward_model(folder, tmp_path / "model")
    write_sequence_classifier(source, tmp_path / "export")
    exported = names_in(tmp_path / "export")
    assert exported == {name for name in weights if "lm_head" not in name} | {"score.weight"}
    load_sequence_classifier(tmp_path / "export").save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == exported


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_say_what_they_are(exports: Callable[..., Any], family: str) -> None:
    _, policy, export = exports(family)
    saved = json.loads((export / "config.json").read_text())
    assert saved["architectures"] == [{"llava": "Llava", "llava_next": "LlavaNext"}[family] + "ForSequenceClassification"]
    config = AutoConfig.from_pretrained(export)
    # vLLM sizes the head by the text part's labels, and leaves out its sigmoid where that part says regression.
    for part in (config, config.text_config):
        assert (part.num_labels, part.id2label, part.problem_type) == (1, {0: "reward"}, "regression")
        assert part.pad_token_id == 0
    assert "score_bias" not in saved
    weight = load_file(export / "model.safetensors")["score.weight"]
    assert torch.equal(weight, policy.value_head.summary.weight)
    assert {file.name for file in export.iterdir()} == {
        *("model.safetensors", "config.json", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_a_base_model_with_tied_embeddings_is_exported_too(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llava", tie_word_embeddings=True)
    source, policy = reward_model(folder, tmp_path / "model")
    write_sequence_classifier(source, tmp_path / "export")
    expected = expected_scores(policy, folder, IMAGES["one image"])
    model = load_sequence_classifier(tmp_path / "export")
    torch.testing.assert_close(scores(model, tmp_path / "export", IMAGES["one image"]), expected, atol=MERGED, rtol=0)


@pytest.fixture
def padded_with_eos(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose tokenizer pads with its end mark, as many do."""
    folder = tmp_path / "base"
    AutoModelForImageTextToText.from_pretrained(model_folder("llava", pad_token_id=2)).save_pretrained(folder)
    processor = make_processor("llava")
    processor.tokenizer.pad_token = "</s>"
    processor.save_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).tokenizer.pad_token_id == 2
    assert AutoConfig.from_pretrained(folder).text_config.pad_token_id == 2
    return folder


@pytest.mark.parametrize("layout", ["transformers", "vllm"])
@pytest.mark.parametrize("sft_type", ["lora", "full"])
def test_a_reward_model_of_a_text_model_is_exported_too(
    model_folder: Callable[..., Path], tmp_path: Path, sft_type: str, layout: Any
) -> None:
    base, out = model_folder("llama"), tmp_path / "out"
    _, policy = reward_model(base, tmp_path / "model", sft_type)
    run(ExportConfig(model=str(tmp_path / "model"), output_dir=str(out), layout=layout))
    assert "score.weight" in names_in(out)  # for vLLM, too
    pair = encode_pair(base, "0", QUESTION, *ANSWERS)
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    for model in (load_sequence_classifier(out), AutoModelForSequenceClassification.from_pretrained(out)):
        with torch.no_grad():
            found = model.eval()(input_ids=ids).logits.squeeze(1)
        torch.testing.assert_close(found, expected_scores(policy, base, IMAGES["no image"][:1])[:1], atol=MERGED, rtol=0)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_mark_is_scored_where_it_was_the_padding_token(padded_with_eos: Path, tmp_path: Path, side: str) -> None:
    source, policy = reward_model(padded_with_eos, tmp_path / "model")
    export = tmp_path / "export"
    write_sequence_classifier(source, export)
    config = AutoConfig.from_pretrained(export)
    tokenizer = AutoProcessor.from_pretrained(export).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id, config.text_config.pad_token_id) == ("<pad>", 0, 0)
    expected = expected_scores(policy, padded_with_eos, IMAGES["0 to 2 images"])
    model = load_sequence_classifier(export)
    torch.testing.assert_close(scores(model, export, IMAGES["0 to 2 images"], side=side), expected, atol=MERGED, rtol=0)
    # What the choice prevents: with the end mark as padding, each score is that of the token before it.
    model.config.text_config.pad_token_id = 2
    assert (scores(model, export, IMAGES["0 to 2 images"], side=side) - expected).abs().min() > 1e-3


def test_without_a_token_to_pad_with_rows_are_scored_one_at_a_time(
    padded_with_eos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = padded_with_eos / name
        path.write_text(path.read_text().replace("<pad>", "<x>"))
    source, policy = reward_model(padded_with_eos, tmp_path / "model")
    export = tmp_path / "export"
    write_sequence_classifier(source, export)
    assert [record.getMessage() for record in caplog.records if record.name == "rayalign.serving.score_head"] == [
        "The tokenizer has no token that could serve as padding beside its end mark: score rows one at a time."
    ]
    assert AutoConfig.from_pretrained(export).text_config.pad_token_id is None
    model = load_sequence_classifier(export)
    alone = [scores(model, export, [(RED,)], answers=[answer]) for answer in ANSWERS]
    expected = expected_scores(policy, padded_with_eos, [(RED,)])
    torch.testing.assert_close(torch.cat(alone), expected, atol=MERGED, rtol=0)
    with pytest.raises(ValueError, match=r"Cannot handle batch sizes > 1 if no padding token is defined\."):
        scores(model, export, [()])


def test_a_bias_from_elsewhere_is_told_written_and_added_by_our_loader(
    model_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, export = model_folder("llava"), tmp_path / "export"
    source, _ = reward_model(folder, tmp_path / "model")
    head = tmp_path / "model" / "value_head.safetensors"
    save_file({**load_file(head), "v_head.summary.bias": torch.tensor([0.75])}, head)
    policy = make_policy(source, needs=RM().needs)
    write_sequence_classifier(source, export)
    assert [record.getMessage() for record in caplog.records if record.name == "rayalign.serving.score_head"] == [
        "The value head has a bias of 0.75, which this form has no place for: scores will be lower by it (higher, where it is "
        "negative), their order stays. load_sequence_classifier adds it from config.json; for vLLM pass "
        "PoolerConfig(logit_mean=-0.75)."
    ]
    assert json.loads((export / "config.json").read_text())["score_bias"] == 0.75
    expected = expected_scores(policy, folder, IMAGES["one image"])
    ours = scores(load_sequence_classifier(export), export, IMAGES["one image"])
    torch.testing.assert_close(ours, expected, atol=MERGED, rtol=0)
    plain: Any = type("Scorer", (GenericForSequenceClassification, LlavaPreTrainedModel), {})
    theirs = scores(plain.from_pretrained(export), export, IMAGES["one image"])
    torch.testing.assert_close(theirs, expected - 0.75, atol=MERGED, rtol=0)


def test_loaded_in_bfloat16_the_head_stays_float32(exports: Callable[..., Any], registered: Callable[[Any], None]) -> None:
    folder, policy, export = exports("llava_next")
    model = load_sequence_classifier(export, dtype=torch.bfloat16)
    assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(model.score.weight, policy.value_head.summary.weight)
    ours = scores(model, export, IMAGES["one image"])
    assert ours.dtype == torch.float32
    # bfloat16 keeps 8 bits; a state passes through a dozen roundings of numbers near 1.
    torch.testing.assert_close(ours, expected_scores(policy, folder, IMAGES["one image"]), atol=0.15, rtol=0)
    assert (ours - ours.bfloat16()).abs().max() > 0  # the scores themselves aren't rounded to it
    registered(model.config)
    auto = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.bfloat16)
    assert torch.equal(scores(auto, export, IMAGES["one image"]), ours)


@pytest.mark.parametrize("shards", ["5GB", "150KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_for_vllm_has_the_head_on_the_language_model(
    model_folder: Callable[..., Path], tmp_path: Path, family: str, shards: str
) -> None:
    source, policy = reward_model(model_folder(family), tmp_path / "model")
    for layout in ("transformers", "vllm"):
        write_sequence_classifier(source, tmp_path / layout, layout=layout, max_shard_size=shards)
    names = names_in(tmp_path / "transformers") - {"score.weight"} | {"language_model.score.weight"}
    assert names_in(tmp_path / "vllm") == names
    assert torch.equal(
        load_file(tmp_path / "vllm" / "score.safetensors")["language_model.score.weight"], policy.value_head.summary.weight
    )
    index = tmp_path / "vllm" / "model.safetensors.index.json"
    assert index.exists() == (shards == "150KB")
    if index.exists():
        # vLLM reads the files that the index names, and no other.
        assert set(json.loads(index.read_text())["weight_map"]) == names
    assert (tmp_path / "vllm" / "config.json").read_text() == (tmp_path / "transformers" / "config.json").read_text()
    with pytest.raises(ValueError) as caught:
        load_sequence_classifier(tmp_path / "vllm")
    assert str(caught.value) == (
        f"{tmp_path}/vllm: lacks the weights score.weight. Give the folder that export wrote with --layout transformers."
    )


def test_with_its_value_head_in_a_file_a_merged_reward_model_scores_as_in_training(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    _, policy = reward_model(model_folder("llava"), tmp_path / "model")
    run(ExportConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), layout="value_head"))
    merged = make_policy(tmp_path / "out", needs=RM().needs)
    expected = expected_scores(policy, model_folder("llava"), IMAGES["0 to 2 images"])
    found = expected_scores(merged, tmp_path / "out", IMAGES["0 to 2 images"])
    torch.testing.assert_close(found, expected, atol=MERGED, rtol=0)
    assert complaint(model=str(tmp_path / "out"), output_dir=str(tmp_path / "again"), layout="value_head") == (
        f"--layout value_head: {tmp_path / 'out'} has no adapter to merge, and is of that form already: copy it."
    )


def complaint(**flags: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(ExportConfig(**flags))
    return str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert complaint(model=f"file://{tmp_path}/none", output_dir=str(tmp_path / "out")) == (
        f"--model file://{tmp_path}/none: there is no such folder (looked for {tmp_path}/none)."
    )
    assert not (tmp_path / "out").exists()


def test_weights_and_adapters_are_exported_whole_or_not_at_all(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base, model = Path(shutil.copytree(model_folder("llava"), tmp_path / "base")), tmp_path / "model"
    source, _ = reward_model(base, model)
    adapter, weights = load_file(model / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    half = {name: value for name, value in adapter.items() if ".layers.0." in name}
    save_file(half, model / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "it lacks 14 tensors that its config asks for" in complaint(model=str(model), output_dir=str(tmp_path / "out"))
    save_file(adapter, model / "adapter_model.safetensors", metadata={"format": "pt"})
    lost = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(lost, base / "model.safetensors", metadata={"format": "pt"})
    assert "its files lack 7 tensors" in complaint(model=str(model), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # The export has no output head.
    save_file(
        {name: value for name, value in weights.items() if name != "lm_head.weight"},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_sequence_classifier(source, tmp_path / "out")


def test_an_adapter_with_old_names_is_exported_like_one_with_new_names(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source, _ = reward_model(model_folder("llava"), tmp_path / "model")
    write_sequence_classifier(source, tmp_path / "new")
    file = tmp_path / "model" / "adapter_model.safetensors"
    old = {name.replace("model.language_model.", "language_model.model."): value for name, value in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    config = tmp_path / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace("model.language_model.", "language_model.model."))
    write_sequence_classifier(source, tmp_path / "old")
    new, mapped = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    assert new.keys() == mapped.keys()
    assert all(torch.equal(new[name], mapped[name]) for name in new)


def test_a_folder_with_anything_else_in_it_is_never_overwritten(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tmp_path / "run" / "model", tmp_path / "out"
    reward_model(model_folder("llava"), model)
    for folder in (model, tmp_path / "run"):
        assert complaint(model=str(model), output_dir=str(folder), overwrite=True) == (
            f"--output_dir {folder} holds the model that is exported. Choose another folder."
        )
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    assert complaint(model=str(model), output_dir=str(out)) == (
        f"--output_dir {out} is not empty. Pass --overwrite true to replace an earlier export, or another --output_dir."
    )
    assert complaint(model=str(model), output_dir=str(out), overwrite=True) == (
        f"--output_dir {out} holds something else than an earlier export, which is all that --overwrite true replaces. "
        "Choose another folder."
    )
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert (
        complaint(model=str(model))
        == complaint(output_dir=str(out))
        == ("Pass --model with the model/ folder of a run, and --output_dir with a new folder.")
    )


@pytest.mark.parametrize("layout", ["transformers", "value_head", "trl"])
def test_the_base_model_is_never_overwritten_though_it_is_an_earlier_export(
    model_folder: Callable[..., Path], tmp_path: Path, layout: Any
) -> None:
    base, model = tmp_path / "all" / "merged", tmp_path / "model"
    shutil.copytree(model_folder("llava"), base)
    write_card(base, name="merged", base="llava", model=Store.at(str(tmp_path / "earlier")))
    reward_model(base, model)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    for output, how in ((base, "holds"), (tmp_path / "link", "holds"), (base / "new", "lies in")):
        assert complaint(model=str(model), output_dir=str(output), overwrite=True, layout=layout) == (
            f"--output_dir {output} {how} its base model, {base}. Choose another folder."
        )
    assert complaint(model=str(model), output_dir=str(model / "new"), layout=layout) == (
        f"--output_dir {model}/new lies in the model that is exported. Choose another folder."
    )
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_overwriting_leaves_no_file_of_the_earlier_export(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    source, _ = reward_model(model_folder("llava"), tmp_path / "model")
    write_sequence_classifier(source, tmp_path / "out", layout="vllm", max_shard_size="150KB")
    write_card(tmp_path / "out", name="out", base=source.base, model=Store.at(str(tmp_path / "model")))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    run(ExportConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), overwrite=True))
    assert {file.name for file in (tmp_path / "out").glob("*safetensors*")} == {"model.safetensors"}


def test_model_and_export_may_be_remote(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    _, policy = reward_model(model_folder("llava"), tmp_path / "model")
    run(ExportConfig(model=f"file://{tmp_path}/model", output_dir=f"file://{tmp_path}/out"))
    expected = expected_scores(policy, model_folder("llava"), IMAGES["one image"])
    model = load_sequence_classifier(tmp_path / "out")
    torch.testing.assert_close(scores(model, tmp_path / "out", IMAGES["one image"]), expected, atol=MERGED, rtol=0)


def parse(*words: str) -> ExportConfig:
    return command_line.parse_section(
        ExportConfig, words, prog="pipelines/export.py", description="A test.", example="--model x"
    )


def test_flags_come_from_words_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: a\nlayout: vllm\n")
    assert parse("--config", f"{tmp_path}/a.yaml", "--model", "b", "--overwrite") == ExportConfig(
        model="b", layout="vllm", overwrite=True
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modle", "x"], "Unknown flag --modle. Did you mean --model?"),
        (["--confg", "x"], "Unknown flag --confg. Did you mean --config?"),
        (["--layout", "vlm"], "--layout vlm: must be one of transformers, vllm, value_head, trl, ms_swift. Did you mean vllm?"),
        (["--model", "a", "b"], "Unexpected word 'b': every value follows its --flag."),
        (["--config", "FOLDER/bad.yaml"], "Unknown flag --outputdir. Did you mean --output_dir?"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "bad.yaml").write_text("outputdir: x\n")
    with pytest.raises(SystemExit) as stopped:
        parse(*(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"pipelines/export.py: error: {message}\n(--help lists every flag)\n"


def test_the_pipeline_exports_without_ray(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    reward_model(model_folder("llava"), tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    code = (
        f"import runpy, sys; sys.argv = ['pipelines/export.py', *{words!r}]; "
        "runpy.run_path('pipelines/export.py', run_name='__main__'); sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"The reward model in sequence-classification form is in {tmp_path}/out\n")
    assert names_in(tmp_path / "out") >= {"score.weight"}


def test_flags_of_a_run_of_another_version_stand_in_the_card_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rlhf_type: dpo\nlearning_rate: fast\nbatch_size: 1\n")
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", name="out", base="base", model=Store.at(str(tmp_path / "model")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| learning_rate | fast |" in card
    assert "batch_size" not in card
