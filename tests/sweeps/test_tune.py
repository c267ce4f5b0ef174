"""What a sweep hands to its trials."""

from pathlib import Path

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import DataConfig, ModelConfig
from rayalign.sweeps.tune import with_whole_paths


def test_relative_paths_of_a_sweep_lead_to_the_same_places_from_a_trials_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava").mkdir()
    (tmp_path / "sft").mkdir()
    config = Config(
        DPO(),
        data=DataConfig(
            dataset=("rows.jsonl#20", "parts/*.parquet", "rlaif-v#100", "s3://bucket/rows"),
            val_dataset=("./held.jsonl",),
            image_root="pictures",
            cache_dir="cache",
        ),
        model=ModelConfig(model="llava", adapter="sft"),
    )
    whole = with_whole_paths(config)
    here = str(tmp_path)
    assert whole.data.dataset == (f"{here}/rows.jsonl#20", f"{here}/parts/*.parquet", "rlaif-v#100", "s3://bucket/rows")
    assert whole.data.val_dataset == (f"{here}/held.jsonl",)
    assert (whole.data.image_root, whole.data.cache_dir) == (f"{here}/pictures", f"{here}/cache")
    assert (whole.model.model, whole.model.adapter) == (f"{here}/llava", f"{here}/sft")
    assert with_whole_paths(whole) == whole


def test_what_is_no_path_stays_as_it_is() -> None:
    config = Config(DPO(), data=DataConfig(dataset=("rlaif-v",)), model=ModelConfig(model="owner/name"))
    assert with_whole_paths(config) == config
