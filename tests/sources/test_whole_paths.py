"""A run's paths mean the same in every process."""

from pathlib import Path

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.sources.whole_paths import whole_model, with_whole_paths


def test_relative_paths_lead_to_the_same_places_from_any_working_folder(
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
        run=RunConfig(eval_benchmarks=("pope:coco", "no-folder")),
    )
    whole = with_whole_paths(config)
    here = str(tmp_path)
    assert whole.data.dataset == (f"{here}/rows.jsonl#20", f"{here}/parts/*.parquet", "rlaif-v#100", "s3://bucket/rows")
    assert whole.data.val_dataset == (f"{here}/held.jsonl",)
    assert (whole.data.image_root, whole.data.cache_dir) == (f"{here}/pictures", f"{here}/cache")
    assert (whole.model.model, whole.model.adapter) == (f"{here}/llava", f"{here}/sft")
    assert whole.run.output_dir == f"{here}/output/dpo"
    assert whole.run.eval_benchmarks == (f"pope:{here}/coco", "no-folder")  # which is refused elsewhere
    monkeypatch.chdir("/")
    assert with_whole_paths(whole) == whole


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    model = ModelConfig(model="owner/name", adapter="s3://bucket/adapter")
    run = RunConfig(output_dir=f"file://{tmp_path}")
    config = Config(DPO(), data=DataConfig(dataset=("rlaif-v",)), model=model, run=run)
    assert with_whole_paths(config) == config


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir", "image_root"])
def test_a_url_that_no_file_system_has_is_refused_with_its_flag(flag: str) -> None:
    with pytest.raises(ValueError) as caught:
        with_whole_paths(Config(DPO()).replace({flag: "ftp://host/folder"}))
    assert str(caught.value) == (
        f"--{flag} ftp://host/folder: Unrecognized filesystem type in URI: ftp://host/folder. Give a path, or a URL of s3://, "
        "gs:// or file://."
    )


@pytest.mark.parametrize("place", ["s3://", "s3:/bucket/folder", "s3:bucket", "gs:///", "file:/shared/folder"])
def test_a_url_that_was_cut_short_is_not_taken_for_a_folder(place: str) -> None:
    with pytest.raises(ValueError) as caught:
        with_whole_paths(Config(DPO()).replace({"cache_dir": place}))
    assert str(caught.value) == (f"--cache_dir {place}: is no path and no whole URL. Write one such as s3://bucket/folder.")


def test_a_name_with_a_slash_is_the_folder_where_there_is_one_and_else_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert whole_model("runs/base") == str(tmp_path / "runs" / "base")
    assert [whole_model(name) for name in ("owner/base", "s3://bucket/base")] == ["owner/base", "s3://bucket/base"]
