"""A folder of results holds what was made with one set of settings."""

from pathlib import Path
from typing import Any

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
    for overwrite in (False, True):  # rows of which nothing tells where they come from
        with pytest.raises(ValueError, match="holds the rows of something else"):
            open_output(output, {"seed": 2, "model": ["a"]}, overwrite=overwrite)
    assert (output / "rows" / "000000000-0123.parquet").exists()


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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "whose"),
    [
        ({"rlhf_type": "dpo", "n": 4}, {"verb": "generate"}, "iterate"),
        ({"verb": "score"}, {"verb": "generate"}, "score"),
        ({"verb": "generate"}, {"rlhf_type": "dpo", "n": 4}, "generate"),
        ({"model": {}}, {"verb": "score"}, "evaluate or of something else"),
    ],
)
def test_the_results_of_another_verb_are_refused_and_kept(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], whose: str, overwrite: bool
) -> None:
    output = Store(str(tmp_path / "out"))
    open_output(output, before, overwrite=False)
    (output / "round_1" / "x").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        open_output(output, now, overwrite=overwrite, names=["round_1"])
    words = f"--output_dir {output.location} holds the results of {whose}, which would be lost. Choose another folder."
    assert str(caught.value) == words
    assert (output / "settings.json").read_json() == before
    assert (output / "round_1" / "x").exists()


def test_a_training_that_goes_on_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rlhf_type: dpo\n")
    with pytest.raises(ValueError, match="is the folder of a training run, which would be lost"):
        open_output(Store(str(tmp_path)), {"verb": "generate"}, overwrite=True)


def test_what_a_verb_writes_beside_a_pool_is_deleted_where_it_is_its_own_only(tmp_path: Path) -> None:
    output, settings = Store(str(tmp_path / "out")), {"rlhf_type": "dpo"}
    (output / "round_1" / "x").write_bytes(b"")
    with pytest.raises(ValueError, match="holds the round_1 of something else"):
        open_output(output, settings, overwrite=True, names=["round_1"])
    (output / "round_1").delete()
    open_output(output, settings, overwrite=False)
    (output / "round_1" / "x").write_bytes(b"")
    open_output(output, {**settings, "n": 2}, overwrite=True, names=["round_1"])
    assert [inner.name for inner in output.list()] == ["settings.json"]
