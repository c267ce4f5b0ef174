"""The chat templates that TRL lends to models without one: which fits, and where the response begins in them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trl.chat_template_utils
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from rayalign.algorithms.dpo import DPO
from rayalign.config.config import Config
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.data import prepare
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.formats.records import Message, PreferenceRecord
from rayalign.models.chat_templates import PACKAGED, packaged_template
from rayalign.models.registry import find_family
from tests.tiny_families import make_tokenizer
from tests.tiny_models import noise_image

KINDS = sorted(PACKAGED)


def config_of(kind: str) -> Any:
    text = PACKAGED[kind].text_type
    return AutoConfig.for_model(kind, **({"text_config": {"model_type": text}} if text else {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_gets_trls_template_of_its_name(kind: str) -> None:
    found = packaged_template(make_tokenizer(more=PACKAGED[kind].special_tokens), config_of(kind))
    assert found is not None
    assert found.name == PACKAGED[kind].name
    assert found.text == getattr(trl.chat_template_utils, f"{found.name}_chat_template")


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_begins_a_response_where_the_prompt_ends(kind: str) -> None:
    tokenizer = make_tokenizer(more=PACKAGED[kind].special_tokens)
    found = packaged_template(tokenizer, config_of(kind))
    assert found is not None

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": text if find_family(kind).text_only else [{"type": "text", "text": text}]}

    def render(turns: Sequence[Any], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(turns, chat_template=found.text, tokenize=False, **options))

    turns = [turn("user", "One?"), turn("assistant", "1."), turn("user", "Two?")]
    prompt = render(turns, add_generation_prompt=True)
    whole = render([*turns, turn("assistant", "2.")])
    assert all(text in prompt for text in ("One?", "1.", "Two?"))
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip().startswith("2.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_does_not_fit_a_tokenizer_that_lacks_one_of_its_special_tokens(kind: str) -> None:
    for missing in set(PACKAGED[kind].special_tokens) - {"<image>"}:  # the tiny tokenizer always has this one
        others = [token for token in PACKAGED[kind].special_tokens if token != missing]
        assert packaged_template(make_tokenizer(more=others), config_of(kind)) is None


def test_a_kind_of_model_that_the_table_does_not_hold_gets_none() -> None:
    tokenizer = make_tokenizer(more=PACKAGED["llama"].special_tokens)
    assert packaged_template(tokenizer, AutoConfig.for_model("mistral")) is None
    vicuna = AutoConfig.for_model("llava_next", text_config={"model_type": "llama"})
    assert packaged_template(tokenizer, vicuna) is None


@pytest.fixture
def without_template(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's tiny model whose files hold no chat template; its tokenizer has these `special_tokens` more."""

    def make(family: str, *, special_tokens: Sequence[str] = ()) -> Path:
        folder = tmp_path / family
        shutil.copytree(model_folder(family), folder)
        (folder / "chat_template.jinja").unlink()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)
        tokenizer.save_pretrained(folder)
        return folder

    return make


RECORD = PreferenceRecord(
    id="r", messages=(Message(role="user", content="<image>Which?"),), images=("a.png",), chosen="two", rejected="a cat"
)


def test_a_model_without_a_template_is_encoded_with_the_one_lent(without_template: Callable[..., Path]) -> None:
    folder = without_template("qwen2_5_vl", special_tokens=["<|im_start|>", "<|im_end|>"])
    spec = EncoderSpec(str(folder), responses="both")
    pair = Encoder(spec).encode(RECORD, [noise_image(30, 40, seed=1)])
    text = spec.tokenizer.decode(pair.prompt_ids).replace("<|image_pad|>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert spec.tokenizer.decode(pair.chosen_ids) == "two<|im_end|></s>"
    assert spec.lent_template == "qwen2_5_vl"


def test_the_lent_template_is_part_of_the_fingerprint_and_is_saved_with_the_processor(
    without_template: Callable[..., Path], tmp_path: Path
) -> None:
    folder = without_template("qwen2_5_vl", special_tokens=["<|im_start|>", "<|im_end|>"])
    spec = EncoderSpec(str(folder), responses="both")
    spec.processor.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "chat_template.jinja"
    assert saved.read_text() == trl.chat_template_utils.qwen2_5_vl_chat_template
    before = spec.fingerprint()
    shutil.copy(saved, folder)
    own = EncoderSpec(str(folder), responses="both")
    assert own.lent_template is None
    assert own.fingerprint() == before
    (folder / "chat_template.jinja").write_text(saved.read_text() + " ")
    assert EncoderSpec(str(folder), responses="both").fingerprint() != before


def test_a_models_own_template_and_its_familys_are_kept(model_folder: Callable[..., Path]) -> None:
    for family in ("llava_next", "qwen2_5_vl", "paligemma"):
        folder = model_folder(family)
        spec = EncoderSpec(str(folder), responses="both")
        own = (folder / "chat_template.jinja").read_text() if (folder / "chat_template.jinja").exists() else None
        assert spec.lent_template is None
        assert spec.processor.chat_template == own


def test_where_no_template_fits_the_model_is_refused(without_template: Callable[..., Path]) -> None:
    for family in ("qwen2_5_vl", "llava"):  # one whose tokenizer lacks the special tokens, and one that TRL has nothing for
        folder = without_template(family)
        with pytest.raises(ValueError) as caught:
            Encoder(EncoderSpec(str(folder), responses="both"))
        assert str(caught.value) == (
            f"The model {folder} has no chat template, so its prompts can't be written. It is probably a base model: take the "
            "instruction-tuned one, or put a chat_template.jinja into its folder."
        )


def test_trl_is_not_imported_for_its_templates(without_template: Callable[..., Path]) -> None:
    folder = without_template("llava_next")
    script = (
        "import sys, rayalign.data.prepare\n"
        "from rayalign.data.encoder_spec import EncoderSpec\n"
        f"print(EncoderSpec({json.dumps(str(folder))}, responses='both').lent_template, 'trl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["llava_next", "False"]


def test_a_template_lent_is_the_one_that_the_saved_processor_uses(
    without_template: Callable[..., Path], tmp_path: Path
) -> None:
    spec = EncoderSpec(str(without_template("llava_next")), responses="both")
    spec.processor.save_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    text = AutoProcessor.from_pretrained(tmp_path / "saved").apply_chat_template(turns, add_generation_prompt=True)
    assert text == "[INST] <image>\nWhich? [/INST]"


def test_a_run_says_once_that_a_template_is_lent(
    without_template: Callable[..., Path],
    model_folder: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(prepare, "prepare", lambda *_: None)  # the records don't matter here, and would need a cluster
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    folder = without_template("llava_next")
    for model in (folder, model_folder("llava_next")):
        data = DataConfig(dataset=("a.jsonl",), val_dataset=("b.jsonl",))
        prepare.prepare_run(Config(DPO(), model=ModelConfig(model=str(model)), data=data, run=RunConfig(output_dir="out")))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rayalign")] == [
        f"Model: {folder} brings no chat template; prompts are written with TRL's llava_next. A base model must learn its "
        "special tokens"
    ]
