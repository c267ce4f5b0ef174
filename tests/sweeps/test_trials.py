"""Trials and their folders: names, what a folder says, and the queue of those still to run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayalign.storage import Store
from rayalign.sweeps.trials import Outcome, Queue, Trial, known_settings, read_outcome, trials_of

MARGINS = "eval_rewards/margins"


def write_trial(folder: Path, margins: dict[int, float], *, name: str | None = None, **note: Any) -> Store:
    """A trial's folder with an evaluation at each step, and the note that tells its state."""
    folder.mkdir(parents=True)
    lines = [{"step": step, MARGINS: value, "eval_loss": -value} for step, value in margins.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 1.0}]))
    if name is not None:
        (folder / name).write_text(json.dumps(note))
    return Store.at(str(folder))


def outcome_of(folder: Store, mode: str = "max") -> Outcome:
    return read_outcome(folder, Trial(1, {}), metric=MARGINS, mode=mode)


def test_a_trials_folder_is_named_by_its_number_and_values():
    assert Trial(3, {"beta": 0.1, "model": "a/b c", "lora_target_modules": ["q", "v"]}).name == (
        "003_beta=0.1_model=a-b-c_lora_target_modules=q+v"
    )
    assert Trial(12, {"max_steps": None, "use_dora": True}, seed=43).name == "012_max_steps=none_use_dora=true_seed=43"


def test_long_names_are_cut_and_keep_number_and_seed():
    name = Trial(3, {"lora_target_modules": ["x" * 500]}, seed=43).name
    assert len(name) < 120
    assert name.startswith("003_lora")
    assert name.endswith("x_seed=43")


def test_more_seeds_keep_the_trials_of_one():
    one, three = (trials_of([{"beta": 1.0}, {"beta": 2.0}], first_seed=42, num_seeds=n) for n in (1, 3))
    assert {trial.name for trial in one} < {trial.name for trial in three}
    assert [trial.flags for trial in three[:3]] == [{"beta": 1.0}, {"beta": 1.0, "seed": 43}, {"beta": 1.0, "seed": 44}]


def test_a_finished_trial_has_the_summarys_value_and_the_metrics_of_its_last_and_best_evaluation(tmp_path: Path):
    # The model is that of step 2 (--load_best_model_at_end), and so is the summary.
    found = outcome_of(
        write_trial(tmp_path / "a", {0: 9.0, 2: 0.5, 4: 0.1}, name="summary.json", steps=4, seconds=7.0, **{MARGINS: 0.5})
    )
    assert (found.state, found.value, found.steps, found.seconds) == ("finished", 0.5, 4, 7.0)
    assert found.last == {"step": 4, MARGINS: 0.1, "eval_loss": -0.1}
    assert found.best == {"step": 2, MARGINS: 0.5, "eval_loss": -0.5}
    assert outcome_of(Store.at(f"{tmp_path}/a"), "min").best["step"] == 4


def test_a_stopped_trial_has_the_value_it_came_to(tmp_path: Path):
    found = outcome_of(write_trial(tmp_path / "a", {2: 0.5, 3: 0.4}, name="stopped.json", num_steps=9, seconds=3.0))
    assert (found.state, found.value, found.steps, found.num_steps, found.has_ended) == ("stopped", 0.4, 3, 9, True)


def test_a_failed_trial_and_one_without_a_word_are_to_be_run_again(tmp_path: Path):
    failed = outcome_of(write_trial(tmp_path / "a", {}, name="failed.json", error="The loss is nan."))
    assert (failed.state, failed.error, failed.has_ended) == ("failed", "The loss is nan.", False)
    assert outcome_of(Store.at(f"{tmp_path}/none")).state == "unfinished"


def test_a_value_that_is_not_finite_ranks_nowhere(tmp_path: Path):
    found = outcome_of(write_trial(tmp_path / "a", {2: float("nan")}, name="summary.json", steps=2, **{MARGINS: float("nan")}))
    assert (found.state, found.value) == ("finished", None)


def test_what_a_trial_cost_is_told_by_the_sizes_of_its_metrics_at_the_end(tmp_path: Path):
    folder = write_trial(
        tmp_path / "a", {2: 0.5}, name="summary.json", **{MARGINS: 0.5, "eval_drift": -3.0, "eval_nll_loss": 2.0}
    )
    # eval_loss is of the last line.
    assert outcome_of(folder).sizes == {MARGINS: 0.5, "eval_drift": 3.0, "eval_nll_loss": 2.0, "eval_loss": 0.5}


def test_the_queue_skips_what_has_ended_and_then_asks_for_more():
    trials = trials_of([{"beta": 1.0}, {"beta": 2.0}], first_seed=1, num_seeds=1)
    more = trials_of([{"beta": 3.0}], first_seed=1, num_seeds=1, start=3)
    asked: list[list[str]] = []

    def read(trial: Trial) -> Outcome:
        return Outcome(trial, "finished" if trial.number != 2 else "failed")

    def propose(outcomes: list[Outcome]) -> list[Trial]:
        asked.append([outcome.state for outcome in outcomes])
        return more if len(asked) == 1 else []

    queue = Queue(trials, read, propose=propose)
    assert queue.next() == trials[1]
    assert queue.ended(trials[1]).state == "failed"
    assert queue.next() == more[0]
    assert queue.next() is None
    assert asked == [["finished", "failed"], ["finished", "failed", "unfinished"]]


def test_the_settings_begun_are_read_in_order_and_a_gap_is_refused(tmp_path: Path):
    for number in (2, 1):
        (tmp_path / "trials" / f"00{number}").mkdir(parents=True)
        note = {"number": number, "flags": {"beta": number / 2}, "seed": None}
        (tmp_path / "trials" / f"00{number}" / "trial.json").write_text(json.dumps(note))
    assert known_settings(Store.at(str(tmp_path))) == [{"beta": 0.5}, {"beta": 1.0}]
    (tmp_path / "trials" / "001" / "trial.json").unlink()
    with pytest.raises(ValueError, match=r"lacks some of the sweep's trials: it has the numbers \[2\]"):
        known_settings(Store.at(str(tmp_path)))
