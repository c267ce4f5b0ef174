"""A run's paths, seen by every node."""

from pathlib import Path
from typing import Any

import pytest

from rayalign import cluster, shared_paths
from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.training import places
from rayalign.training.places import check_places, require_lasting_folders


def test_a_job_needs_a_cache_that_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.JOB_VARIABLE, "{}")
    run = RunConfig(output_dir="s3://bucket/run")
    require_lasting_folders(Config(DPO(), run=run, data=DataConfig(cache_dir="/shared/cache")))
    with pytest.raises(ValueError, match=r"^--cache_dir cache: the results would lie in .* and deletes"):
        require_lasting_folders(Config(DPO(), run=run, data=DataConfig(cache_dir="cache")))


@pytest.fixture
def sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What nodes were asked to look for, by a run with every local input there is."""
    for name in ("model", "adapter", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"picture")
    (tmp_path / "pictures" / "gone.png").symlink_to("nowhere")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{tmp_path}/model"}}'
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found: dict[str, Any] = {}
    monkeypatch.setattr(places, "check_shared_paths", lambda inputs, written: found.update(inputs=inputs, written=written))
    config = Config(
        DPO(),
        data=DataConfig(dataset=(f"{tmp_path}/rows.jsonl",), image_root=f"{tmp_path}/pictures"),
        model=ModelConfig(adapter=f"{tmp_path}/adapter"),
        run=RunConfig(output_dir=f"{tmp_path}/run"),
    )
    check_places(config)
    return found


def test_every_local_file_that_a_run_reads_is_looked_for(tmp_path: Path, sought: dict[str, Any]) -> None:
    here, adapter = str(tmp_path), tmp_path / "adapter" / "adapter_config.json"
    assert [(file.given, file.path.removeprefix(here), file.size) for file in sought["inputs"]] == [
        (f"--dataset {here}/rows.jsonl", "/rows.jsonl", 3),
        (f"--image_root {here}/pictures", "/pictures", None),
        (f"--image_root {here}/pictures", "/pictures/a.png", 7),
        (f"The model {here}/model", "/model/config.json", 2),
        (f"The model {here}/model", "/model/model.safetensors", 7),
        (f"--adapter {here}/adapter", "/adapter/adapter_config.json", adapter.stat().st_size),
    ]


def test_every_local_folder_that_a_run_writes_to_is_looked_into(tmp_path: Path, sought: dict[str, Any]) -> None:
    assert sought["written"] == {
        f"--output_dir {tmp_path}/run": f"{tmp_path}/run",
        f"--cache_dir (default: {tmp_path}/.rayalign_cache)": f"{tmp_path}/.rayalign_cache",
    }


def test_what_lies_on_an_object_store_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(places, "check_shared_paths", lambda inputs, written: found.extend((inputs, written)))
    check_places(Config(DPO(), model=ModelConfig(model="owner/name"), run=RunConfig(output_dir="s3://bucket/run")))
    assert found == [[], {}]
    assert shared_paths.problem_of({"10.0.0.1": []}, num_nodes=1) is None
