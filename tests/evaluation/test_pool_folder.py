"""A folder of results holds what was made with one set of settings."""

from pathlib import Path

import pytest

from rayalign.evaluation.pool_folder import open_output
from rayalign.storage import Store


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    output = Store(str(tmp_path / "out"))
    open_output(output, {"seed": 1, "model": ["a"]}, overwrite=False)
    open_output(output, {"model": ("a",), "seed": 1}, overwrite=False)
    with pytest.raises(ValueError, match=r"made with other settings:\n  seed: 1 -> 2\nPass --overwrite true"):
        open_output(output, {"seed": 2, "model": ["a"]}, overwrite=False)
    open_output(output, {"seed": 2, "model": ["a"]}, overwrite=True)
    (output / "settings.json").delete()
    (output / "rows" / "000000000-0123.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing tells where they come from"):
        open_output(output, {"seed": 2}, overwrite=False)


def test_only_the_settings_that_differ_are_told(tmp_path: Path) -> None:
    output = Store(str(tmp_path / "out"))
    before = {"scorers": [{"kind": "python", "text": "1f"}, {"kind": "judge"}], "files": {"/a/b.json": "5 bytes"}, "seed": 1}
    open_output(output, before, overwrite=False)
    with pytest.raises(ValueError, match="other settings") as caught:
        open_output(
            output, {**before, "scorers": [{"kind": "python", "text": "2a"}, {"kind": "judge"}], "files": {}}, overwrite=False
        )
    assert str(caught.value).splitlines()[1:-1] == ["  files /a/b.json: 5 bytes -> None", "  scorers 0 text: 1f -> 2a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_verb_wrote_into_a_folder_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "summary.json").write_text('{"algorithm": "dpo"}')
    (tmp_path / "dropped.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds the summary\.json of something else, such as a training run"):
        open_output(Store(str(tmp_path)), {"seed": 1}, overwrite=overwrite)
    assert (tmp_path / "summary.json").read_text() == '{"algorithm": "dpo"}'
