"""Adapters in the folders of TRL and ms-swift: loaded by peft onto the plain base model they give the numbers of training; and
reward models of ms-swift up to 3.0 give theirs here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSequenceClassification

from rayalign.config.inference import InferenceConfig
from rayalign.config.sections import TunerConfig
from rayalign.config.serving import ExportConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import Sources
from rayalign.evaluation.loaded_model import load_model
from rayalign.evaluation.start import config_of
from rayalign.policy.saving import save_policy
from rayalign.serving.export import run, sequence_classifier_class
from tests.serving.test_export import ANSWERS, IMAGES, expected_scores, reward_model, scores
from tests.tiny_models import encode_pair, make_batch, make_policy, wake_adapters

# The same float32 products, of which transformers' forward has other shapes.
SAME = 1e-5


def export(model: Path, output: Path, layout: Any) -> Path:
    run(ExportConfig(model=str(model), output_dir=str(output), layout=layout))
    return output


@pytest.mark.parametrize("layout", ["trl", "ms_swift"])
def test_a_policys_adapter_loads_with_peft_and_gives_the_log_probs_of_training(
    model_folder: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    base = model_folder("llava")
    policy = wake_adapters(make_policy(base, tuner=TunerConfig(lora_target_modules=("ALL",), use_rslora=True)))
    save_policy(policy, tmp_path / "model")
    EncoderSpec(str(base), "both").processor.save_pretrained(tmp_path / "model")
    written = export(tmp_path / "model", tmp_path / "out", layout)
    before = load_file(tmp_path / "model" / "adapter_model.safetensors")
    after = load_file(written / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    pair = encode_pair(base, "0", "Which digit is it?", *ANSWERS, images=IMAGES["one image"][0])
    batch = make_batch(base, [pair])
    with torch.no_grad():
        expected = policy.logps(batch, policy.image_features(batch)).chosen.total
    config = json.loads((written / "adapter_config.json").read_text())
    plain: Any = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(plain, written).eval()
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, **batch.image_inputs).logits[0, len(pair.prompt_ids) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(pair.chosen_ids)[:, None]).sum()
    torch.testing.assert_close(found, expected[0], atol=SAME * len(pair.chosen_ids), rtol=0)
    names = {file.name for file in written.iterdir()}
    assert {"README.md", "tokenizer.json", "processor_config.json"} <= names
    assert ("args.json" in names) == (layout == "ms_swift")


@pytest.mark.parametrize("layout", ["trl", "ms_swift"])
def test_a_reward_models_adapter_brings_its_head_to_a_plain_classifier(
    model_folder: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    base = model_folder("llava")
    _, policy = reward_model(base, tmp_path / "model")
    written = export(tmp_path / "model", tmp_path / "out", layout)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    plain: Any = sequence_classifier_class(config).from_pretrained(base, config=config)  # with a new head, of random weights
    plain.config.get_text_config().pad_token_id = plain.config.pad_token_id = 0  # the processor's, as both tools set it
    model = PeftModel.from_pretrained(plain, written)
    torch.testing.assert_close(
        scores(model, written, IMAGES["0 to 2 images"]),
        expected_scores(policy, base, IMAGES["0 to 2 images"]),
        atol=SAME,
        rtol=0,
    )
    if layout == "ms_swift":
        assert json.loads((written / "args.json").read_text()) == {
            "model": str(base),
            "train_type": "lora",
            "tuner_type": "lora",
            "task_type": "seq_cls",
            "num_labels": 1,
            "problem_type": "regression",
        }


def test_a_reward_model_of_a_text_model_loads_as_trls_documentation_says(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = model_folder("llama")
    _, policy = reward_model(base, tmp_path / "model")
    written = export(tmp_path / "model", tmp_path / "out", "trl")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(plain, written).eval()
    pair = encode_pair(base, "0", "Which digit is it?", *ANSWERS)
    batch = make_batch(base, [pair])
    with torch.no_grad():
        expected, _ = policy.values(batch, policy.image_features(batch))
        found = model(input_ids=torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])).logits
    torch.testing.assert_close(found[0], expected, atol=SAME, rtol=0)


@pytest.mark.parametrize("layout", ["trl", "ms_swift"])
def test_a_model_without_an_adapter_has_no_such_form(model_folder: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    base = model_folder("llava")
    with pytest.raises(ValueError) as caught:
        export(base, tmp_path / "out", layout)
    assert str(caught.value) == f"--layout {layout}: is of an adapter, and {base} has none. Leave it out."


@pytest.mark.parametrize("kind", ["value_head.safetensors", "value_head.bin"])
def test_a_reward_model_of_ms_swift_up_to_3_0_gives_its_scores(
    model_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    base, folder = model_folder("llava"), tmp_path / "checkpoint-100"
    policy = wake_adapters(make_policy(base, tuner=TunerConfig(lora_target_modules=("ALL",))))
    save_policy(policy, folder)  # as peft saves it there, beside files that have no meaning here
    (folder / "sft_args.json").write_text("{}")
    weight, bias = torch.randn(1, 64, generator=torch.manual_seed(3)), torch.tensor([0.5])
    head = {"v_head.summary.weight": weight.bfloat16(), "v_head.summary.bias": bias.bfloat16()}  # in the model's type
    if kind.endswith(".bin"):
        torch.save(head, folder / kind)
    else:
        save_file(head, folder / kind, metadata={"format": "pt"})

    pair = encode_pair(base, "0", "Which digit is it?", *ANSWERS, images=IMAGES["one image"][0])
    batch = make_batch(base, [pair])
    model: Any = policy.model
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, **batch.image_inputs).hidden_states[-1]
        expected = states[0, -1] @ weight[0].bfloat16().float() + bias[0]
    flags = config_of(InferenceConfig(model=str(folder), output_dir=str(tmp_path / "out")))
    loaded = load_model(flags, Sources((), None, allow_image_urls=False))
    assert loaded.is_reward_model
    torch.testing.assert_close(loaded.values(batch)[0][0], expected, atol=SAME, rtol=0)
