import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayalign.algorithms import DPO, KTO, RM, SFT, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.plugins import Plugin
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.index import write_index
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.models.source import ModelSource
from rayalign.report.page import Times
from rayalign.storage import Store
from rayalign.training.run_folder import CONTENTS, FREE_TO_CHANGE, check_run_folder, open_run, write_results
from rayalign.training.run_report import dropped_lines

WAY_OUT = "Pass --overwrite true to delete it, or another --output_dir."


def config_of(folder: Path, **values: Any) -> Config:
    return config_from_mapping(DPO, {"output_dir": str(folder), "model": "m", "dataset": "d.jsonl", **values})


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        open_run(config)
    return str(caught.value)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    open_run(config_of(folder))
    finish_a_checkpoint(folder)
    return folder


def finish_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step_00000010_a").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000010_a" / "manifest.json").write_text("{}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_new_run_makes_its_folder_and_writes_every_flag(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a" / "run", beta=0.3)
    store = open_run(config)
    assert store.location == str(tmp_path / "a" / "run")
    values = yaml.safe_load((store / "config.yaml").read_bytes())
    assert values.pop("rlhf_type") == "dpo"
    assert config_from_mapping(DPO, values) == config


def test_a_folder_with_other_files_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    open_run(config_of(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_with_the_same_configuration_is_continued(unfinished: Path) -> None:
    (unfinished / "metrics.jsonl").write_text("{}\n")
    open_run(config_of(unfinished))
    assert (unfinished / "metrics.jsonl").read_text() == "{}\n"


def test_flags_that_change_neither_data_nor_update_may_change(unfinished: Path) -> None:
    changes = {
        "save_steps": 7,
        "logging_steps": 1,
        "num_workers": 2,
        "gradient_accumulation_steps": 4,
        "batch_size": 2,  # 2 x 4 x 2 = 1 x 16 x 1
        "gradient_checkpointing": False,
        "max_failures": 0,
    }
    assert changes.keys() <= FREE_TO_CHANGE
    open_run(config_of(unfinished, **changes))
    assert yaml.safe_load((unfinished / "config.yaml").read_text())["num_workers"] == 2


def test_a_run_may_become_elastic_and_be_fixed_again_with_the_same_global_batch(unfinished: Path) -> None:
    open_run(config_of(unfinished, num_workers="1:4", gradient_accumulation_steps=4))
    assert refusal(config_of(unfinished, num_workers="1:4")).endswith(
        f"batch_size x gradient_accumulation_steps x num_workers: 16 -> 64\n{WAY_OUT}"
    )
    open_run(config_of(unfinished, num_workers=2, gradient_accumulation_steps=8))


def test_the_type_of_the_arithmetic_stays_whatever_says_it(unfinished: Path) -> None:
    open_run(config_of(unfinished, gpus_per_worker=0))
    assert refusal(config_of(unfinished, gpus_per_worker=1)) == (
        f"--output_dir {unfinished} holds an unfinished run with another configuration:\n"
        f"  dtype: float32 -> bfloat16\n{WAY_OUT}"
    )
    open_run(config_of(unfinished, dtype="float32", gpus_per_worker=1))


def test_before_the_clusters_gpus_are_known_no_type_is_refused(tmp_path: Path) -> None:
    """A run's first look at its folder comes before it joins the cluster."""
    folder = tmp_path / "run"
    open_run(config_of(folder, gpus_per_worker=1.0))  # as the cluster told
    finish_a_checkpoint(folder)
    check_run_folder(config_of(folder))
    open_run(config_of(folder, gpus_per_worker=1.0))
    with pytest.raises(ValueError, match="dtype: bfloat16 -> float32"):
        check_run_folder(config_of(folder, dtype="float32"))
    with pytest.raises(ValueError, match="dtype: bfloat16 -> float32"):
        open_run(config_of(folder, gpus_per_worker=0.0))


def test_a_changed_configuration_is_refused_flag_by_flag(unfinished: Path) -> None:
    config = config_of(unfinished, beta=0.5, learning_rate=1e-4, dataset=["d.jsonl", "e.jsonl"])
    assert refusal(config) == (
        f"--output_dir {unfinished} holds an unfinished run with another configuration:\n"
        "  dataset: ['d.jsonl'] -> ['d.jsonl', 'e.jsonl']\n"
        "  beta: 0.1 -> 0.5\n"
        "  learning_rate: 5e-05 -> 0.0001\n"
        f"{WAY_OUT}"
    )


def test_another_algorithm_is_refused(unfinished: Path) -> None:
    config = config_from_mapping(SFT, {"output_dir": str(unfinished), "model": "m", "dataset": "d.jsonl"})
    assert refusal(config) == (
        f"--output_dir {unfinished} holds an unfinished run with another configuration:\n  rlhf_type: dpo -> sft\n{WAY_OUT}"
    )


@pytest.mark.parametrize(("algorithm", "dropout", "told"), [(SFT, 0.05, True), (SFT, 0.0, False), (DPO, 0.05, False)])
def test_other_micro_batches_are_told_where_dropout_draws_other_masks_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, algorithm: Any, dropout: float, told: bool
) -> None:
    def config(**batch: int) -> Config:
        flags = {"output_dir": str(tmp_path), "model": "m", "dataset": "d.jsonl", "lora_dropout": dropout}
        return config_from_mapping(algorithm, {**flags, **batch})

    open_run(config())
    finish_a_checkpoint(tmp_path)
    open_run(config(batch_size=2, gradient_accumulation_steps=8))
    assert ("--batch_size 1 -> 2: dropout draws its masks for each micro-batch" in caplog.text) is told


def test_another_global_batch_is_refused(unfinished: Path) -> None:
    assert refusal(config_of(unfinished, num_workers=2)) == (
        f"--output_dir {unfinished} holds an unfinished run with another configuration:\n"
        "  batch_size x gradient_accumulation_steps x num_workers: 16 -> 32\n"
        f"{WAY_OUT}"
    )


def test_a_run_keeps_the_text_of_its_plugins_and_continues_with_no_other(tmp_path: Path) -> None:
    folder, text = tmp_path / "run", "FORMATS = (1,)\n"

    def config(*plugins: Plugin) -> Config:
        return config_from_mapping(DPO, {"output_dir": str(folder), "model": "m", "dataset": "d.jsonl"}, plugins=plugins)

    open_run(config(Plugin("/job_1/my_format.py", text)))
    finish_a_checkpoint(folder)
    assert (folder / "plugins" / "my_format.py").read_text() == text
    open_run(config(Plugin("/job_2/my_format.py", text)))  # a job's folder has another name each time
    changed = f"--output_dir {folder} holds an unfinished run with another configuration:\n  plugin: my_format -> "
    edited = Plugin("/job_2/my_format.py", "FORMATS = (2,)\n")
    assert refusal(config(edited)) == f"{changed}my_format (its text has changed)\n{WAY_OUT}"
    assert refusal(config()) == f"{changed}None\n{WAY_OUT}"
    assert refusal(config(Plugin("/job_1/my_format.py", text), Plugin("json"))) == f"{changed}my_format json\n{WAY_OUT}"
    assert (folder / "plugins" / "my_format.py").read_text() == text


def test_a_refusal_leaves_the_folder_as_it_was(unfinished: Path) -> None:
    before = (unfinished / "config.yaml").read_bytes()
    refusal(config_of(unfinished, beta=0.5))
    assert (unfinished / "config.yaml").read_bytes() == before


def test_an_unfinished_run_is_not_continued_against_the_users_will(unfinished: Path) -> None:
    expected = f"--output_dir {unfinished} holds an unfinished run, and --resume is false. {WAY_OUT}"
    assert refusal(config_of(unfinished, resume=False)) == expected


def test_the_folder_of_a_run_and_its_cache_may_move(unfinished: Path, tmp_path: Path) -> None:
    moved = unfinished.rename(tmp_path / "renamed")
    open_run(config_of(moved, cache_dir=str(tmp_path / "cache")))
    assert (moved / "checkpoints" / "step_00000010_a").exists()
    assert yaml.safe_load((moved / "config.yaml").read_text())["output_dir"] == str(moved)
    assert "  beta: 0.1 -> 0.5\n" in refusal(config_of(moved, beta=0.5))


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.5}, {"dataset": "corrected.jsonl"}, {"model": "corrected"}, {"num_workers": 2}, {"resume": False}, {}],
)
def test_a_run_without_a_checkpoint_is_replaced_by_a_corrected_command(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    open_run(config_of(folder))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "reference.json").write_text("{}")
    (folder / "origin.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "step_00000010_a").mkdir(parents=True)  # killed in the middle of its first checkpoint
    (folder / "checkpoints" / "step_00000010_a" / "trainable.safetensors").write_bytes(b"half")
    config = config_of(folder, **changes)
    open_run(config)
    assert sorted(contents(folder)) == ["config.yaml", "notes.txt"]
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values.pop("rlhf_type")
    assert config_from_mapping(DPO, values) == config


def test_a_run_of_another_algorithm_without_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    open_run(config_from_mapping(SFT, {"output_dir": str(tmp_path), "model": "m", "dataset": "d.jsonl"}))
    open_run(config_of(tmp_path))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["rlhf_type"] == "dpo"


def test_a_model_is_never_lost_to_a_corrected_command(tmp_path: Path) -> None:
    open_run(config_of(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("trained")
    assert "  beta: 0.1 -> 0.5\n" in refusal(config_of(tmp_path, beta=0.5))
    assert (tmp_path / "model" / "weights").read_text() == "trained"


def test_files_of_other_programs_are_never_taken_for_a_run_that_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text("source")
    open_run(config_of(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text("site: mine\n")
    before = contents(tmp_path)
    refusal(config_of(tmp_path))
    assert contents(tmp_path) == before
    (tmp_path / "config.yaml").unlink()
    open_run(config_of(tmp_path))
    assert (tmp_path / "plugins" / "mine.py").read_text() == "source"


FLAGS = "the flags that the unfinished run began with"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: b"", "lacks rlhf_type; it was cut short."),
        (lambda text: b"- a\n", "must hold lines of `flag: value`."),
        (lambda text: b"a: " + b"[" * 900, "is nested too deep."),
        (lambda text: text[: text.index(b"beta:")], "lacks batch_size; it was cut short."),
        (lambda text: text[: text.index(b"output_dir:")], "lacks num_workers; it was cut short."),
        (lambda text: text[: text.index(b"max_failures:")], ": it was cut short."),
        (lambda text: text[: text.index(b"max_failures:") + len("max_failures: 3")], ": it was cut short."),
        (lambda text: text[: text.index(b"beta:") + 3], "is not YAML ("),
        (lambda text: b"\x80" + text, "is not YAML ("),
        (lambda text: text.replace(b"num_workers: 1", b"num_workers: one"), "num_workers is 'one' and no whole number."),
        (lambda text: text.replace(b"batch_size: 1\n", b"batch_size: true\n"), "batch_size is True and no whole number."),
    ],
    ids=[
        "empty",
        "list",
        "deep",
        "cut",
        "cut later",
        "cut before the last flag",
        "cut in its line",
        "cut in a line",
        "no text",
        "words for a number",
        "truth for a number",
    ],
)
def test_a_damaged_configuration_is_told_with_its_file(
    unfinished: Path, damage: Callable[[bytes], bytes], problem: str
) -> None:
    file = unfinished / "config.yaml"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(unfinished)
    words = refusal(config_of(unfinished))
    assert words.startswith(f"{file}, {FLAGS}: ")
    assert problem in words
    assert words.endswith(WAY_OUT)
    assert contents(unfinished) == before


@pytest.mark.parametrize("marked", [True, False], ids=["with the mark", "by a version that wrote none"])
def test_a_run_of_a_version_without_some_flags_goes_on_as_if_they_had_their_defaults(
    unfinished: Path, caplog: pytest.LogCaptureFixture, marked: bool
) -> None:
    file = unfinished / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("columns:", "torch_compile:"))]
    lines = lines if marked else lines[: lines.index("max_failures: 3") + 1]
    file.write_text("\n".join(lines) + "\n")
    assert refusal(config_of(unfinished, columns=["a=b"])) == (
        f"--output_dir {unfinished} holds an unfinished run with another configuration:\n  columns: [] -> ['a=b']\n{WAY_OUT}"
    )
    with caplog.at_level(logging.INFO, logger="rayalign.training.run_folder"):
        open_run(config_of(unfinished))
    assert caplog.messages == [
        f"Continuing the unfinished run in {unfinished}",
        "It began with a version that had no --columns, --torch_compile: taken as the default there",
    ]
    assert "columns: []" in file.read_text()
    caplog.clear()
    open_run(config_of(unfinished))
    assert len(caplog.messages) <= 1


def test_a_folder_is_refused_before_anything_is_written(unfinished: Path) -> None:
    before = contents(unfinished)
    for config in (config_of(unfinished, beta=0.5), config_of(unfinished, resume=False)):
        with pytest.raises(ValueError) as caught:
            check_run_folder(config)
        assert str(caught.value) == refusal(config)
    check_run_folder(config_of(unfinished))
    check_run_folder(config_of(unfinished, beta=0.5, overwrite=True))
    check_run_folder(config_of(unfinished.parent / "new"))
    assert contents(unfinished) == before
    assert not (unfinished.parent / "new").exists()
    (unfinished / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        check_run_folder(config_of(unfinished))


def test_checkpoints_without_a_configuration_are_refused(unfinished: Path) -> None:
    (unfinished / "config.yaml").unlink()
    assert refusal(config_of(unfinished)) == (
        f"--output_dir {unfinished} holds checkpoints, and no config.yaml that tells with which flags they were made. {WAY_OUT}"
    )


def test_an_overwriting_cut_short_anywhere_never_leaves_checkpoints_to_a_run_of_other_flags(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("metrics.jsonl", "summary.json", "report.html"):
        (unfinished / name).write_text("old")
    delete, left = Store.delete, 0

    def delete_until_killed(store: Store) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        delete(store)

    for survivor in range(len(CONTENTS)):
        left = survivor
        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", delete_until_killed)
            with pytest.raises(KeyboardInterrupt):
                open_run(config_of(unfinished, overwrite=True, beta=0.5))
        if (unfinished / "checkpoints").exists():
            refusal(config_of(unfinished, beta=0.5))
        assert (unfinished / "config.yaml").exists()
    open_run(config_of(unfinished, beta=0.5))  # what was left of the old run is nothing to keep
    assert sorted(contents(unfinished)) == ["config.yaml"]


def test_a_finished_run_is_never_written_over_by_itself(unfinished: Path) -> None:
    (unfinished / "summary.json").write_text("{}")
    assert refusal(config_of(unfinished)) == f"--output_dir {unfinished} holds a finished run. {WAY_OUT}"


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(unfinished: Path) -> None:
    for name in CONTENTS:
        if name in ("checkpoints", "model"):
            (unfinished / name).mkdir(exist_ok=True)
            (unfinished / name / "file").write_text("old")
        else:
            (unfinished / name).write_text("old")
    (unfinished / "notes.txt").write_text("mine")
    (unfinished / "data").mkdir()
    open_run(config_of(unfinished, overwrite=True, beta=0.5))
    assert sorted(path.name for path in unfinished.iterdir()) == ["config.yaml", "data", "notes.txt"]
    assert yaml.safe_load((unfinished / "config.yaml").read_text())["beta"] == 0.5


ASKED = json.dumps([["user", "Which digit?"]])
IT_IS_TWO, A_CAT = [44, 87, 271, 305, 17, 2], [68, 299, 2]  # "It is two.", "a cat", each with its end
RECORDS = [
    EncodedPair("pair", [310, 270, 34], IT_IS_TWO, A_CAT, [], [], conversation=ASKED),
    EncodedPair("good", [310, 270, 34], IT_IS_TWO, [], [], [], conversation=ASKED),
    EncodedPair("bad", [310, 270, 34], [], A_CAT, [], [], conversation=ASKED),
    EncodedPair("trained", [310, 270, 34], A_CAT, IT_IS_TWO, [], [], conversation=ASKED),  # not held out: it has no scores
]
BOTH, ONLY_CHOSEN, ONLY_REJECTED = (
    {"tokens/chosen": chosen, "tokens/rejected": rejected} for chosen, rejected in ((6, 3), (6, 0), (0, 3))
)
BY_KTO = {
    "pair": {"rewards/chosen": 1.5, "rewards/rejected": 0.25, "logps/chosen": -9.0, "logps/rejected": -9.0, **BOTH},
    "good": {"rewards/chosen": 0.5, "logps/chosen": -9.0, **ONLY_CHOSEN},
    "bad": {"rewards/rejected": 0.125, "logps/rejected": -9.0, **ONLY_REJECTED},
}


@pytest.mark.parametrize(
    ("algorithm", "scores", "shown"),
    [
        (
            KTO,
            BY_KTO,
            [
                ("bad", ["rejected · reward 0.125 · 3 tokens"]),
                ("pair", ["chosen · reward 1.5 · 6 tokens", "rejected · reward 0.25 · 3 tokens"]),
                ("good", ["chosen · reward 0.5 · 6 tokens"]),
            ],
        ),
        (
            RM,
            {"pair": {"rewards/chosen": 1.5, "rewards/rejected": 0.25, "rewards/margins": 1.25, **BOTH}},
            [("pair", ["chosen · reward 1.5 · 6 tokens", "rejected · reward 0.25 · 3 tokens"])],
        ),
        (SFT, {"good": {"logps/chosen": -9.0, **ONLY_CHOSEN}}, [("good", ["chosen · log-prob per token -1.5 · 6 tokens"])]),
    ],
)
def test_the_report_shows_what_was_scored_of_each_held_out_record(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData],
    algorithm: type[Algorithm],
    scores: Mapping[str, Mapping[str, float]],
    shown: list[tuple[str, list[str]]],
) -> None:
    config = config_from_mapping(algorithm, {"output_dir": str(tmp_path / "run"), "model": "m", "dataset": "d.jsonl"})
    store = open_run(config)
    spec = EncoderSpec(str(model_folder("llava")), responses=config.algorithm.needs.responses)
    data = RunData(ModelSource("m"), spec, prepare_pairs(RECORDS), None)
    write_results(store, config, data, {"algorithm": algorithm.name, "steps": 9}, scores, Times())
    page = (tmp_path / "run" / "report.html").read_text()
    cards = re.findall(r'<article class="pair">.*?</article>', page, re.DOTALL)
    found = [
        (re.findall("<code>(.*?)</code>", card)[0], [re.sub("<.*?>", "", side) for side in re.findall("<h4><b>.*?</h4>", card)])
        for card in cards
    ]
    assert found == shown
    assert page.count("Which digit?") == len(shown)
    assert "not finite" not in page
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"algorithm": algorithm.name, "steps": 9}


def test_the_report_counts_the_dropped_records_that_dropped_jsonl_lists(
    tmp_path: Path, model_folder: Callable[..., Path], prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]
) -> None:
    config = config_of(tmp_path / "run")
    store = open_run(config)
    training, held_out = (
        PreparedData.finish(
            data.store,
            attempt=data.attempt,
            index=write_index(data.folder, [data.index()]),
            dropped=[{"reason": r} for r in reasons],
        )
        for data, reasons in (
            (prepare_pairs(RECORDS[:2]), ["empty", "empty"]),
            (prepare_pairs(RECORDS[2:]), ["empty", "too_long", "too_long"]),
        )
    )
    data = RunData(
        ModelSource("m"),
        EncoderSpec(str(model_folder("llava")), responses=config.algorithm.needs.responses),
        training,
        held_out,
    )
    assert len(dropped_lines(data)) == 5
    write_results(store, config, data, {"algorithm": "dpo", "steps": 9}, {}, Times())
    page = (tmp_path / "run" / "report.html").read_text()
    table = page[page.index("Dropped records") :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table[: table.index("</table>")])
    assert cells == ["empty", "3", "too_long", "2", "total", "5"]
