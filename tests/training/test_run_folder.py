import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayalign.algorithms import DPO, KTO, RM, SFT, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.plugins import Plugin
from rayalign.data.encode import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.models.source import ModelSource
from rayalign.training.run_folder import CONTENTS, FREE_TO_CHANGE, open_run, write_results

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
    return folder


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


def test_a_finished_run_is_never_written_over_by_itself(unfinished: Path) -> None:
    (unfinished / "summary.json").write_text("{}")
    assert refusal(config_of(unfinished)) == f"--output_dir {unfinished} holds a finished run. {WAY_OUT}"


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(unfinished: Path) -> None:
    for name in CONTENTS:
        if name in ("checkpoints", "model"):
            (unfinished / name).mkdir()
            (unfinished / name / "file").write_text("old")
        else:
            (unfinished / name).write_text("old")
    (unfinished / "notes.txt").write_text("mine")
    (unfinished / "data").mkdir()
    open_run(config_of(unfinished, overwrite=True, beta=0.5))
    assert sorted(path.name for path in unfinished.iterdir()) == ["config.yaml", "data", "notes.txt"]
    assert yaml.safe_load((unfinished / "config.yaml").read_text())["beta"] == 0.5


IT_IS_TWO, A_CAT = [44, 87, 271, 305, 17, 2], [68, 299, 2]  # "It is two.", "a cat", each with its end
RECORDS = [
    EncodedPair("pair", [310, 270, 34], IT_IS_TWO, A_CAT, [], []),
    EncodedPair("good", [310, 270, 34], IT_IS_TWO, [], [], []),
    EncodedPair("bad", [310, 270, 34], [], A_CAT, [], []),
    EncodedPair("trained", [310, 270, 34], A_CAT, IT_IS_TWO, [], []),  # not held out: it has no scores
]
BY_KTO = {
    "pair": {"rewards/chosen": 1.5, "rewards/rejected": 0.25, "logps/chosen": -9.0, "logps/rejected": -9.0},
    "good": {"rewards/chosen": 0.5, "logps/chosen": -9.0},
    "bad": {"rewards/rejected": 0.125, "logps/rejected": -9.0},
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
            {"pair": {"rewards/chosen": 1.5, "rewards/rejected": 0.25, "rewards/margins": 1.25}},
            [("pair", ["chosen · reward 1.5 · 6 tokens", "rejected · reward 0.25 · 3 tokens"])],
        ),
        (SFT, {"good": {"logps/chosen": -9.0}}, [("good", ["chosen · log-prob per token -1.5 · 6 tokens"])]),
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
    write_results(store, config, data, {"algorithm": algorithm.name}, scores)
    page = (tmp_path / "run" / "report.html").read_text()
    cards = re.findall(r'<article class="pair">.*?</article>', page, re.DOTALL)
    found = [
        (re.findall("<code>(.*?)</code>", card)[0], [re.sub("<.*?>", "", side) for side in re.findall("<h4><b>.*?</h4>", card)])
        for card in cards
    ]
    assert found == shown
    assert page.count("Which digit?") == len(shown)
    assert "not finite" not in page
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"algorithm": algorithm.name}
