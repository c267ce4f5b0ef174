"""What verbs that run a model over records begin with: their data, and a folder for the results that is none of the data's."""

from pathlib import Path

import pytest

from rayalign.config.inference import InferenceConfig
from rayalign.evaluation.start import config_of, sources_of


@pytest.mark.parametrize(
    ("dataset", "output", "problem"),
    [
        ("resp/rows", "resp", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows"),
        ("resp/rows#1", "resp/rows", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows#1"),
        ("resp/rows/*.jsonl", "link", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows/*.jsonl"),
        ("resp", "resp/rows/out", "lies in the folder of --dataset {here}/resp, and its results would be taken for records"),
        ("resp/rows/a.jsonl", "resp/rows/out", None),
        ("resp/rows", "resp/rows2", None),
    ],
)
def test_an_output_folder_that_is_holds_or_lies_in_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, output: str, problem: str | None
) -> None:
    (tmp_path / "resp" / "rows").mkdir(parents=True)
    (tmp_path / "resp" / "rows" / "a.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(tmp_path / "resp")
    monkeypatch.chdir(tmp_path)
    config = config_of(InferenceConfig(dataset=(dataset,), output_dir=output))
    if problem is None:
        assert sources_of(config).datasets
        return
    with pytest.raises(ValueError) as caught:
        sources_of(config)
    words = problem.format(here=tmp_path)
    assert str(caught.value) == f"--output_dir {tmp_path}/{output}: {words}. Choose a folder beside the data."
