"""A checkpoint as a model folder: the files that the run itself would have written at that step."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rayalign
from rayalign.algorithms import DPO, RM, SFT, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.sections import ModelConfig
from rayalign.config.serving import ExportConfig
from rayalign.data.encode import EncoderSpec
from rayalign.evaluation.scorers.by_model import model_scorer
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import resolve_model
from rayalign.policy.loading import load_policy
from rayalign.policy.saving import save_policy
from rayalign.serving.export_folder import CHECKPOINT_NOTE
from rayalign.storage import Store
from rayalign.training.best import Best, write_note
from rayalign.training.checkpoint import Snapshot, write_checkpoint
from rayalign.training.checkpoint_export import HOW_TO_NAME, run
from rayalign.training.checkpoint_folder import checkpoint_name
from rayalign.training.optimizer import make_optimizer
from rayalign.training.origin import ORIGIN_NOTE
from rayalign.training.run_folder import open_run

STEPS = (10, 20)


def write_run(folder: Path, model: Path, algorithm: type[Algorithm] = DPO, **flags: Any) -> Config:
    """A run's folder with checkpoints after 10 (the best) and 20 steps, of other weights each, and the model/ of the last."""
    config = config_from_mapping(algorithm, {"output_dir": str(folder), "model": str(model), "dataset": "d.jsonl", **flags})
    open_run(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, gpus_per_worker=0.0)))
    policy = load_policy(
        resolve_model(config.model, REGISTERED_MODELS),
        model=config.model,
        tuner=config.tuner,
        device=torch.device("cpu"),
        needs=config.algorithm.needs,
        seed=config.optimizer.seed,
    )
    for step in STEPS:
        with torch.no_grad():
            for parameter in policy.trainable.values():
                parameter += 0.01 * torch.randn_like(parameter)
        place = folder / "checkpoints" / checkpoint_name(step, "a")
        place.mkdir(parents=True)
        write_checkpoint(Store(str(place)), Snapshot.of(policy, make_optimizer(policy, config.optimizer), step=step))
        written = folder / f"model_{step}"
        written.mkdir()
        save_policy(policy, written, safe_serialization=config.run.safe_serialization)
        EncoderSpec(model=resolve_model(config.model, REGISTERED_MODELS).base, responses="both").processor.save_pretrained(
            written
        )
    write_note(Store(str(folder)), Best("eval_loss", 10, 1.0), checkpoint_name(10, "a"))
    return config


def export(folder: Path, output: Path, checkpoint: str = "last", **flags: Any) -> str:
    return run(ExportConfig(checkpoint=checkpoint, run_dir=str(folder), output_dir=str(output), **flags)).location


def refusal(**flags: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(ExportConfig(**flags))
    return str(caught.value)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a model's folder but the export's note; of JSON what it says (peft writes lists in any order)."""

    def read(file: Path) -> Any:
        if file.name != "adapter_config.json":
            return file.read_bytes()
        return {key: sorted(value) if isinstance(value, list) else value for key, value in json.loads(file.read_text()).items()}

    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != CHECKPOINT_NOTE]
    return {str(file.relative_to(folder)): read(file) for file in files}


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "dpo"
    write_run(place, model)
    return place


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        (DPO, {"use_dora": True, "lora_target_modules": "ALL"}),
        (SFT, {"sft_type": "full", "freeze_vit": False}),
        (DPO, {"sft_type": "full", "dtype": "bfloat16"}),
        (RM, {}),
        (RM, {"sft_type": "full", "safe_serialization": False}),
        (SFT, {"dtype": "float16", "attn_implementation": "eager", "gradient_checkpointing": False}),
    ],
    ids=["dora", "full", "full in bfloat16", "reward model", "full reward model", "float16"],
)
def test_an_exported_checkpoint_has_the_files_of_the_runs_own_model(
    tmp_path: Path, model: Path, algorithm: type[Algorithm], flags: dict[str, Any]
) -> None:
    write_run(tmp_path / "run", model, algorithm, **flags)
    export(tmp_path / "run", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "model_20")


@pytest.mark.parametrize("stacked", [False, True])
def test_a_checkpoint_of_a_run_that_began_with_an_adapter_is_exported(tmp_path: Path, folder: Path, stacked: bool) -> None:
    write_run(tmp_path / "run", folder / "model_20", stack_adapter=stacked)
    export(tmp_path / "run", tmp_path / "out", "best")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "model_10")


@pytest.mark.parametrize("named", ["adapter", "model and adapter", "plain model"])
def test_implicit_rewards_of_an_exported_checkpoint_are_those_of_its_run(
    tmp_path: Path, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Of a run that began with an adapter, with a merged SFT model, in a folder of its own and in that of another run."""
    start: dict[str, Any] = {
        "adapter": {"model": str(folder / "model_20")},
        "model and adapter": {"model": str(model), "adapter": str(folder / "model_20")},
        "plain model": {"model": str(model)},
    }[named]
    write_run(tmp_path / "run", beta=0.3, **start)
    write_run(tmp_path / "other", model)
    monkeypatch.chdir(tmp_path)
    for output in ("out", "other/best"):
        export(Path("run"), Path(output))
        scorer = model_scorer("implicit_reward", ModelConfig(model=str(tmp_path / output)), beta=None, reference=None)
        assert scorer.reference is not None
        assert (scorer.reference.model, scorer.reference.adapter, scorer.beta) == (start["model"], start.get("adapter"), 0.3)


def test_an_exported_checkpoint_names_by_its_whole_path_the_start_that_has_moved(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    export(folder, tmp_path / "out", model="../dpo/model_20")
    note = json.loads((tmp_path / "out" / CHECKPOINT_NOTE).read_text())
    assert note["run"] == {"model": str(folder / "model_20"), "model_type": None, "adapter": None, "beta": 0.1}


def test_the_base_model_alone_is_refused_where_the_run_began_with_an_adapter(tmp_path: Path, folder: Path, model: Path) -> None:
    write_run(tmp_path / "run", folder / "model_20")
    (tmp_path / "run" / ORIGIN_NOTE).write_text('{"adapter": {"adapter_model.safetensors": "100 bytes"}}')
    flags = {"checkpoint": "last", "run_dir": str(tmp_path / "run"), "output_dir": str(tmp_path / "out")}
    assert refusal(**flags, model=str(model)) == (
        f"--model {model}: the run began with an adapter, {folder / 'model_20'}, and this is none. Give the folder where that "
        "adapter is now."
    )
    export(tmp_path / "run", tmp_path / "out", model=str(folder / "model_20"))
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "model_20")


@pytest.mark.parametrize(
    ("name", "step"), [("last", 20), ("best", 10), ("10", 10), ("20", 20), ("step_00000010_a", 10), ("step_00000020_a", 20)]
)
def test_a_checkpoint_is_named_in_its_run(tmp_path: Path, folder: Path, name: str, step: int) -> None:
    assert export(folder, tmp_path / "out", name) == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder / f"model_{step}")


def test_a_checkpoint_is_named_by_its_folder(tmp_path: Path, folder: Path) -> None:
    run(ExportConfig(checkpoint=str(folder / "checkpoints" / "step_00000010_a") + "/", output_dir=str(tmp_path / "out")))
    assert contents(tmp_path / "out") == contents(folder / "model_10")
    written = rayalign.export(output_dir=tmp_path / "again", checkpoint=20, run_dir=folder)
    assert contents(Path(written)) == contents(folder / "model_20")


def test_a_run_that_has_moved_with_its_model_is_exported_with_the_models_place(tmp_path: Path, model: Path) -> None:
    base = tmp_path / "base"
    base.symlink_to(model)
    write_run(tmp_path / "run", base)
    base.unlink()
    words = refusal(checkpoint="last", run_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "out"))
    assert words.startswith(f"--model {base}: ")
    export(tmp_path / "run", tmp_path / "out", model=str(model))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run" / "model_20" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, folder: Path) -> None:
    for name in ("30", "newest", "step_00000030_a", "0"):
        assert refusal(checkpoint=name, run_dir=str(folder), output_dir=str(tmp_path / "out")) == (
            f"--checkpoint {name}: {folder} has no such checkpoint. Of these steps it keeps whole ones: 10 (best), 20."
        )
    for place in (folder, tmp_path, folder / "checkpoints", folder / "checkpoints" / "step_00000030_a"):
        words = f"--checkpoint {place}: is no folder of a whole checkpoint of a run. {HOW_TO_NAME}"
        assert refusal(checkpoint=str(place), output_dir=str(tmp_path / "out")) == words
    assert refusal(run_dir=str(folder), output_dir="o") == f"{HOW_TO_NAME} --output_dir names a new folder."
    assert "Of these steps it keeps whole ones: none." in refusal(checkpoint="best", run_dir=str(tmp_path), output_dir="o")


def test_a_checkpoint_that_is_damaged_is_never_exported(tmp_path: Path, model: Path) -> None:
    write_run(tmp_path / "run", model)
    newest = tmp_path / "run" / "checkpoints" / "step_00000020_a"
    content = bytearray((newest / "trainable.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "trainable.safetensors").write_bytes(bytes(content))
    assert refusal(checkpoint="last", run_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "out")) == (
        f"The checkpoint {newest} is damaged: trainable.safetensors does not have the hash it was saved with."
    )
    (newest / "manifest.json").unlink()
    export(tmp_path / "run", tmp_path / "out")  # the last one that is whole
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "model_10")
    (tmp_path / "run" / "config.yaml").unlink()
    words = refusal(checkpoint="last", run_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "new"))
    assert words == f"{tmp_path}/run/config.yaml: is not there, so the run's flags are unknown."


def test_only_an_earlier_export_is_written_over(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    export(folder, out, "best")
    assert refusal(checkpoint="last", run_dir=str(folder), output_dir=str(out)) == (
        f"--output_dir {out} is not empty. Pass --overwrite true to replace an earlier export, or another --output_dir."
    )
    export(folder, out, "last", overwrite=True)
    assert contents(out) == contents(folder / "model_20")
    (out / "notes.txt").write_text("mine")
    words = refusal(checkpoint="last", run_dir=str(folder), output_dir=str(out), overwrite=True)
    assert words.startswith(f"--output_dir {out} holds something else than an earlier export (notes.txt), which is all")
    assert (out / "notes.txt").read_text() == "mine"


def test_another_runs_model_and_what_the_run_began_with_are_never_written_over(tmp_path: Path, folder: Path) -> None:
    began, run_dir = tmp_path / "began", tmp_path / "run"
    export(folder, began, "best")  # an export by itself
    write_run(run_dir, began)
    others = contents(folder / "model_20")
    flags: dict[str, Any] = {"checkpoint": "last", "run_dir": str(run_dir), "overwrite": True}
    assert refusal(**flags, output_dir=str(folder / "model_20")) == (
        f"--output_dir {folder}/model_20 holds something else than an earlier export, which is all that --overwrite true "
        "replaces. Choose another folder."
    )
    assert contents(folder / "model_20") == others
    assert refusal(**flags, output_dir=str(began)) == (
        f"--output_dir {began} holds the adapter that the run began with, {began}. Choose another folder."
    )
    last = run_dir / "checkpoints" / "step_00000020_a"
    for output, how in ((last / "model", "lies in"), (run_dir, "holds")):
        assert refusal(**flags, output_dir=str(output)) == (
            f"--output_dir {output} {how} the checkpoint that is exported. Choose another folder."
        )


def test_the_layout_of_a_reward_model_is_the_next_exports_business() -> None:
    assert refusal(checkpoint="last", run_dir="r", output_dir="o", layout="vllm") == (
        "--layout vllm with --checkpoint: a checkpoint becomes what the run's model/ is. Leave --layout out, then export that "
        "folder with --model and --layout."
    )


def test_a_run_of_a_plugins_algorithm_is_exported_with_the_text_that_the_run_kept(tmp_path: Path, model: Path) -> None:
    write_run(tmp_path / "run", model, SFT)
    file = tmp_path / "run" / "config.yaml"
    text = re.sub("^rlhf_type: sft$", "rlhf_type: mine\nplugin: [gone/mine.py]", file.read_text(), flags=re.MULTILINE)
    file.write_text(text)
    (tmp_path / "run" / "plugins").mkdir()
    (tmp_path / "run" / "plugins" / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom rayalign.algorithms import SFT\n"
        '@dataclass(frozen=True)\nclass Mine(SFT):\n    """Mine"""\n    name = "mine"\nALGORITHMS = (Mine,)\n'
    )
    export(tmp_path / "run", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "model_20")


def test_an_export_needs_no_cluster() -> None:
    text = "import sys, rayalign.training.checkpoint_export; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
