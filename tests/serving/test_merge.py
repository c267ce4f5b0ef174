"""An adapter merged into its model: one plain folder whose log-probs are those of the policy that was trained."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from rayalign.config.sections import TunerConfig
from rayalign.config.serving import ExportConfig
from rayalign.models.processors import load_processor
from rayalign.models.source import ModelSource
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.serving.export import run
from rayalign.serving.merge import write_merged
from rayalign.serving.model_card import write_card
from rayalign.storage import Store
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image, wake_adapters

MERGED = 1e-5
"""Of log-probs in float32, relative: the merged weights' sums are rounded anew."""

TUNERS = {
    "LoRA": TunerConfig(lora_target_modules=("ALL",)),
    "rsLoRA": TunerConfig(lora_target_modules=("ALL",), use_rslora=True, lora_rank=4),
    "DoRA": TunerConfig(lora_target_modules=("ALL",), use_dora=True),
    "tower and aligner": TunerConfig(lora_target_modules=("ALL",), freeze_vit=False, freeze_aligner=False),
}


def trained(folder: Path, model: Path, tuner: TunerConfig, adapter: str | None = None, **settings: Any) -> Policy:
    """A policy that has moved, and its folder as a run leaves it."""
    policy = wake_adapters(make_policy(ModelSource(str(folder), adapter), tuner=tuner, **settings), seed=len(str(adapter)))
    save_policy(policy, model)
    load_processor(str(folder)).save_pretrained(model)
    return policy


def logps(policy: Policy, folder: Path) -> Tensor:
    images = [noise_image(40, 30, seed=1)]
    pairs = [encode_pair(folder, "a", "Which digit is it?", "The digit is two.", "a cat", images=images)]
    batch = make_batch(folder, pairs)
    with torch.no_grad():
        return policy.token_logps(batch, policy.image_features(batch))


def plain(folder: Path) -> Policy:
    """What the exported folder is by itself: no adapter that changes anything is on it."""
    return make_policy(folder)


def assert_same(policy: Policy, base: Path, out: Path) -> None:
    expected, found = logps(policy, base), logps(plain(out), out)
    torch.testing.assert_close(found, expected, atol=MERGED * float(expected.abs().max()), rtol=0)
    assert (expected - logps(plain(base), base)).abs().max() > 1e-2


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_merged_folder_has_the_log_probs_of_the_policy(
    model_folder: Callable[..., Path], tmp_path: Path, tuner: str
) -> None:
    base = model_folder("llava_next")
    policy = trained(base, tmp_path / "run" / "model", TUNERS[tuner])
    run(ExportConfig(model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "out")))
    assert_same(policy, base, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    model, processor = (of.from_pretrained(tmp_path / "out") for of in (AutoModelForImageTextToText, AutoProcessor))
    assert {*model.state_dict()} == {*AutoModelForImageTextToText.from_pretrained(base).state_dict()}
    assert processor.chat_template == AutoProcessor.from_pretrained(base).chat_template


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_so_it_has_with_tied_embeddings_and_other_families(
    model_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = model_folder(family)
    policy = trained(base, tmp_path / "model", TUNERS["LoRA"])
    write_merged(ModelSource(str(base), str(tmp_path / "model")), tmp_path / "out")
    assert_same(policy, base, tmp_path / "out")


def test_two_adapters_that_were_stacked_are_merged_both(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = model_folder("llava")
    trained(base, tmp_path / "sft", TUNERS["LoRA"])
    tuner = TunerConfig(lora_target_modules=("DEFAULT",), lora_rank=4, stack_adapter=True)
    policy = trained(base, tmp_path / "dpo", tuner, adapter=str(tmp_path / "sft"))
    write_merged(ModelSource(str(base), str(tmp_path / "dpo")), tmp_path / "out")
    assert_same(policy, base, tmp_path / "out")


def test_weights_of_16_bits_are_rounded_once(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = model_folder("llava")
    trained(base, tmp_path / "model", TUNERS["LoRA"])
    half = tmp_path / "half"
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoProcessor.from_pretrained(base).save_pretrained(half)
    exact = tmp_path / "exact"
    AutoModelForImageTextToText.from_pretrained(half, dtype=torch.float32).save_pretrained(exact)
    for name in ("half", "exact"):
        write_merged(ModelSource(str(tmp_path / name), str(tmp_path / "model")), tmp_path / f"{name}-out")
    rounded, whole = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("half", "exact"))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # in its import
def test_an_adapter_of_4_bits_is_merged_into_the_weights_they_were_made_of(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = model_folder("llava")
    tuner = TunerConfig(lora_target_modules=("ALL",), quant_bits=4)
    trained(base, tmp_path / "run" / "model", tuner)
    run(ExportConfig(model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "out")))
    unquantised = make_policy(ModelSource(str(base), str(tmp_path / "run" / "model")), tuner=TunerConfig())
    assert_same(unquantised, base, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_large_model_is_written_in_shards_with_its_own_generation_config(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("llava"), base)
    settings = {"do_sample": True, "temperature": 0.3, "eos_token_id": [2, 5]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    policy = trained(base, tmp_path / "model", TUNERS["LoRA"])
    write_merged(ModelSource(str(base), str(tmp_path / "model")), tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in settings} == settings
    assert_same(policy, base, tmp_path / "out")


def test_the_card_tells_what_the_run_says_of_itself_and_no_path(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_folder("llava"), tmp_path / "base-model"))
    trained(base, tmp_path / "run" / "model", TUNERS["LoRA"])
    summary = {
        "algorithm": "dpo",
        "steps": 8,
        "data_key": "abc",
        "eval_rewards/accuracies": 0.7512345,
        "versions": {"ray": "2"},
    }
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    flags = f"rlhf_type: dpo\nbeta: 0.5\nlora_rank: 8\nlora_target_modules: [ALL]\noutput_dir: {tmp_path}\nnum_workers: 4\n"
    (tmp_path / "run" / "config.yaml").write_text(flags)
    run(ExportConfig(model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "my-model")))
    lines = (tmp_path / "my-model" / "README.md").read_text().splitlines()
    for line in (
        "base_model: base-model",
        "- dpo",
        "# my-model",
        "| steps | 8 |",
        "| rewards/accuracies | 0.7512 |",
        "| ray | 2 |",
    ):
        assert line in lines
    assert [line for line in lines if line.startswith(("| beta", "| lora"))] == [
        "| beta | 0.5 |",
        "| lora_target_modules | ALL |",
    ]
    assert not [line for line in lines if str(tmp_path) in line or "num_workers" in line]
    # An export may be replaced by another.
    run(ExportConfig(model=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "my-model"), overwrite=True))


def test_of_places_the_card_tells_names_alone(tmp_path: Path) -> None:
    flags = {
        "rlhf_type": "dpo",
        "dataset": [
            "/home/alice/sets/train.jsonl#1000",
            "sets/more.jsonl",
            "rlaif-v#20",
            "s3://KEY:SECRET@bucket/sets/a.parquet?endpoint_override=10.0.0.3:9000#5",
            "file:///home/alice/b.jsonl",
            "/home/alice/my sets/*.csv",
        ],
        "val_dataset": "~/held/out.jsonl",
        "image_root": "/home/alice/pictures/",
        "cache_dir": "/home/alice/cache",
        "model": "/home/alice/models/llava",
        "adapter": "../runs/sft/model",
        "lora_target_modules": r".*\.(q|v)_proj",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(flags))
    write_card(tmp_path, name="out", base="~/models/llava", model=Store.at(str(tmp_path / "model")))
    card = (tmp_path / "README.md").read_text()
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and " | " in line[2:-2])
    assert rows == {
        "dataset": "train.jsonl#1000 more.jsonl rlaif-v#20 s3://bucket/sets/a.parquet#5 b.jsonl *.csv",
        "val_dataset": "out.jsonl",
        "image_root": "pictures",
        "model": "llava",
        "adapter": "model",
        "lora_target_modules": r".*\.(q|v)_proj",
    }
    assert "base_model: llava\n" in card
    assert not [word for word in ("alice", "held/", "KEY", "SECRET", "10.0.0.3") if word in card]
    flags |= {"model": "llava-hf/llava-1.5-7b-hf"}
    (tmp_path / "config.yaml").write_text(json.dumps(flags))
    write_card(tmp_path, name="out", base="llava-hf/llava-1.5-7b-hf", model=Store.at(str(tmp_path / "model")))
    card = (tmp_path / "README.md").read_text()
    assert "base_model: llava-hf/llava-1.5-7b-hf\n" in card
    assert "| model | llava-hf/llava-1.5-7b-hf |" in card


def complaint(**flags: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(ExportConfig(**flags))
    return str(caught.value)


def test_what_can_not_be_merged_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base, out = model_folder("llava"), str(tmp_path / "out")
    assert complaint(model=str(base), output_dir=out) == (
        f"--model {base}: has neither an adapter, which could be merged, nor a value head (value_head.safetensors or "
        "value_head.bin), as reward models have. It is a plain model already: copy it, or give the model/ folder of a run."
    )
    trained(base, tmp_path / "model", TUNERS["LoRA"])
    assert complaint(model=str(tmp_path / "model"), output_dir=out, layout="vllm") == (
        f"--layout vllm: names the head of a reward model, and {tmp_path}/model has none. Leave it out."
    )
    file = tmp_path / "model" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    said = complaint(model=str(tmp_path / "model"), output_dir=out)
    assert said.startswith(f"{tmp_path}/model: model.language_model.layers.1.mlp.up_proj has numbers that are not finite.")
    assert not (tmp_path / "out").exists()
