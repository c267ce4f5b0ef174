"""A base model's weights are loaded whole or refused with names; what transformers itself does not need is no fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayalign.algorithms import RM
from rayalign.config.sections import ModelConfig, TunerConfig
from tests.tiny_models import TINY, find_family, make_policy


@pytest.fixture
def llava(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A sound model that a test may damage."""
    return Path(shutil.copytree(model_folder("llava"), tmp_path / "llava"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without(folder: Path, part: str) -> None:
    weights = tensors(folder)
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    write(folder, kept)


def complaint(folder: Path, **flags: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make_policy(folder, **flags)
    return str(caught.value)


END = " Copy the model again from where it was made, or correct its config.json."


@pytest.mark.parametrize("sft_type", ["lora", "full"])
def test_a_missing_output_head_is_refused(llava: Path, sft_type: Any) -> None:
    without(llava, "lm_head")
    assert complaint(llava, tuner=TunerConfig(sft_type=sft_type)) == (
        f"{llava}: the weights do not fit its config.json; its files lack 1 tensor, which would hold random numbers: "
        f"lm_head.weight.{END}"
    )


def test_a_reward_model_needs_no_output_head(llava: Path, caplog: pytest.LogCaptureFixture) -> None:
    without(llava, "lm_head")
    both = [make_policy(llava, needs=RM().needs) for _ in range(2)]
    said = [record.getMessage() for record in caplog.records if record.name == "rayalign.policy.weights"]
    assert said == [f"{llava}: has no output head (lm_head.weight); it is not used here, so that it holds random weights"] * 2
    # The workers of a run must not differ even there.
    assert torch.equal(*(policy.base.get_output_embeddings().weight for policy in both))
    without(llava, "layers.1.mlp.up_proj")
    assert "its files lack 1 tensor" in complaint(llava, needs=RM().needs)


@pytest.mark.parametrize(
    ("part", "number"),
    [("layers.1.mlp.up_proj", 1), ("multi_modal_projector", 4), ("embed_tokens", 1), ("vision_tower", 39), (".norm.weight", 1)],
)
def test_missing_tensors_are_refused_in_every_part(llava: Path, part: str, number: int) -> None:
    without(llava, part)
    said = complaint(llava)
    assert f"its files lack {number} tensor" in said
    assert part in said
    assert (" more." in said) == (number > 3)


def test_left_over_tensors_are_refused(llava: Path) -> None:
    write(llava, {**tensors(llava), "score.weight": torch.zeros(1, 64)})
    assert complaint(llava) == (
        f"{llava}: the weights do not fit its config.json; they hold 1 tensor that such a model has no place for: "
        f"score.weight.{END}"
    )


def test_tensors_of_another_shape_are_refused(llava: Path) -> None:
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["vocab_size"] = 700
    (llava / "config.json").write_text(json.dumps(config))
    said = complaint(llava)
    assert said.startswith(
        f"{llava}: the weights do not fit its config.json; 2 tensors of another shape than config.json says: "
        "lm_head.weight is [600, 64] and must be [700, 64]"
    )


def test_a_config_with_more_or_fewer_layers_than_the_weights_is_refused(llava: Path) -> None:
    for number, said in ((3, "its files lack 9 tensors"), (1, "they hold 9 tensors")):
        config = json.loads((llava / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = number
        (llava / "config.json").write_text(json.dumps(config))
        assert said in complaint(llava)


def sharded(folder: Path) -> list[Path]:
    loaded = find_family("llava").auto_class.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_a_cut_and_an_unlisted_shard_are_told(llava: Path) -> None:
    shards = sharded(llava)
    make_policy(llava)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-5])
    assert complaint(llava).startswith(f"{shards[1]}: is damaged or cut off (")
    shards[1].unlink()
    assert complaint(llava) == (
        f"{llava}: lacks 1 file of {len(shards)} that model.safetensors.index.json names: {shards[1].name}. Copy the "
        "whole model again."
    )
    shards[1].write_bytes(whole)
    index = llava / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"] = {name: file for name, file in names["weight_map"].items() if file != shards[1].name}
    index.write_text(json.dumps(names))
    assert "its files lack" in complaint(llava)
    index.write_text('{"weight_map": ')
    assert complaint(llava) == f"{index}: is damaged, or no list of shards. Copy it again from where it was made."


def test_a_folder_without_weights_and_one_with_half_a_file_are_told(llava: Path) -> None:
    file = llava / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert complaint(llava).startswith(f"{file}: is damaged or cut off (")
    file.write_bytes(b"")
    assert complaint(llava).startswith(f"{file}: is damaged or cut off (")
    file.unlink()
    assert complaint(llava) == (
        f"{llava}: has config.json and no weights (model.safetensors, or model.safetensors.index.json with its shards). "
        "Copy the whole model again."
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", TINY)
def test_a_sound_model_of_every_family_is_taken(model_folder: Callable[..., Path], family: str, tied: bool) -> None:
    kernel: Any = "eager" if family == "gemma2" else "sdpa"
    config = ModelConfig(gradient_checkpointing=False, attn_implementation=kernel)
    make_policy(model_folder(family, tie_word_embeddings=tied), model=config)


def test_tied_embeddings_are_no_missing_output_head(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("llama", tie_word_embeddings=True), tmp_path / "llama"))
    assert "lm_head.weight" not in tensors(folder)
    make_policy(folder)


def test_buffers_that_old_files_hold_are_no_left_overs(llava: Path) -> None:
    rotary = {f"model.language_model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    tower = {"model.vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    write(llava, {**tensors(llava), **rotary, **tower})
    make_policy(llava)


def test_what_batch_norms_count_may_be_missing(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("fast_vlm"), tmp_path / "fast_vlm"))
    without(folder, "num_batches_tracked")
    make_policy(folder)


def test_names_of_before_transformers_4_52_are_read_as_before(llava: Path) -> None:
    expected = make_policy(llava).base.state_dict()
    old = {
        "model.language_model.": "language_model.model.",
        "model.multi_modal": "multi_modal",
        "lm_head": "language_model.lm_head",
    }

    def old_name(name: str) -> str:
        return next((before + name.removeprefix(new) for new, before in old.items() if name.startswith(new)), name)

    write(llava, {old_name(name): value for name, value in tensors(llava).items()})
    found = make_policy(llava).base.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if ".lora_" not in name)


def test_a_kernel_that_transformers_lacks_for_a_model_is_refused(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayalign.policy.loading.check_attention", lambda *_, **__: None)  # it refuses all CPUs
    model = ModelConfig(attn_implementation="flex_attention")
    assert complaint(model_folder("qwen2_5_vl"), model=model).startswith(
        "--attn_implementation: transformers' qwen2_5_vl can't be run with it. Leave the flag out; sdpa, the default, fits all "
        "models. (transformers says: Qwen2_5_VLTextModel does not support an attention implementation through torch's"
    )
    assert make_policy(model_folder("llava"), model=model).base  # others have it
