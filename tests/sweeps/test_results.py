"""The ranking, its table and its files."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rayalign.storage import Store
from rayalign.sweeps.results import (
    copy_model,
    cost_of_all,
    ranked,
    require_best,
    saved_in_words,
    setting_lines,
    table,
    uneven_in_words,
    write_tables,
)
from rayalign.sweeps.trials import Outcome, Trial


def finished(number: int, value: float, *, seed: int | None = None, **flags: Any) -> Outcome:
    return Outcome(
        Trial(number, flags or {"beta": number / 10}, seed),
        "finished",
        value=value,
        last={"step": 8, "eval_m": value},
        best={"step": 4, "eval_m": value + 1},
        steps=8,
        num_steps=8,
        seconds=2.0,
    )


STOPPED = Outcome(Trial(7, {"beta": 0.7}), "stopped", value=99.0, steps=2, num_steps=8)
FAILED = Outcome(Trial(8, {"beta": 0.8}), "failed", error="The loss is nan.")


def numbers(outcomes: list[Outcome], mode: str = "max") -> list[int]:
    return [standing.number for standing in ranked(outcomes, mode=mode)]


def test_the_best_value_is_first_and_only_what_finished_can_be():
    outcomes = [FAILED, finished(1, 0.5), STOPPED, finished(2, 0.7)]
    assert numbers(outcomes) == [2, 1, 7, 8]
    assert numbers(outcomes, "min") == [1, 2, 7, 8]


def test_settings_are_ranked_by_the_mean_of_their_seeds():
    outcomes = [finished(1, 0.9), finished(1, 0.1, seed=43), finished(2, 0.6), finished(2, 0.6, seed=43)]
    assert numbers(outcomes) == [2, 1]
    lines = setting_lines(ranked(outcomes, mode="max"), "eval_m")
    assert lines[1] == {
        "beta": 0.1, "number": 1, "eval_m": 0.5, "min": 0.1, "max": 0.9, "std": pytest.approx(0.4 * 2**0.5), "seeds": 2,
    }  # fmt: skip
    text = table(ranked(outcomes, mode="max"), "eval_m").splitlines()
    assert text[0].split() == ["trial", "beta", "eval_m", "min", "max", "std", "seeds", "steps", "state"]
    assert text[2].split() == ["1", "0.1", "0.5", "0.1", "0.9", "0.5657", "2", "8", "finished"]


def test_a_setting_with_a_failed_seed_is_not_the_best():
    failed = Outcome(Trial(1, {"beta": 0.1}, 43), "failed", error="lost")
    assert numbers([finished(1, 0.9), failed, finished(2, 0.6)]) == [2, 1]


def test_the_table_has_a_line_for_each_setting_and_the_errors():
    simpo = finished(2, 0.25, rlhf_type="simpo", simpo_gamma=0.5)
    text = table(ranked([finished(1, 0.5, rlhf_type="dpo"), simpo, FAILED], mode="max"), "eval_m")
    assert text.splitlines() == [
        "trial  rlhf_type  simpo_gamma  beta  eval_m  steps  state",
        "1      dpo        -            -     0.5     8      finished",
        "2      simpo      0.5          -     0.25    8      finished",
        "8      -          -            0.8   -       0      failed",
        "Trial 8 (beta=0.8) failed: The loss is nan.",
    ]


def test_the_steps_that_stopped_trials_saved_are_told():
    assert saved_in_words([finished(1, 0.5), STOPPED], "asha") == "asha stopped 1 of 2 trials: 6 of 16 steps were not needed"
    assert saved_in_words([finished(1, 0.5)], "asha") == ""


def test_without_a_cost_metric_the_cost_is_one_that_most_trials_have():
    with_reference = Outcome(Trial(1, {}), "finished", sizes={"eval_drift": 90.0, "eval_nll_loss": 1.0})
    without = Outcome(Trial(2, {}), "finished", sizes={"eval_nll_loss": 2.0})
    assert cost_of_all([with_reference, FAILED]) == "eval_drift"
    assert cost_of_all([with_reference, without]) == "eval_nll_loss"


def test_trials_that_were_evaluated_on_other_numbers_of_records_are_told():
    alike = [replace(finished(number, 0.5), held_out=40) for number in (1, 2)]
    assert uneven_in_words([*alike, FAILED]) == ""
    assert uneven_in_words([*alike, replace(finished(3, 0.5), held_out=37)]) == (
        "Trials were evaluated on 37 to 40 held-out records, as what they search leaves out different ones: their figures are "
        "not of the same records"
    )


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (
            [FAILED],
            "No setting has finished, so there is no best one. Trial 8 (beta=0.8) failed: The loss is nan.",
        ),
        (
            [Outcome(Trial(1, {}), "finished", last={"step": 1, "eval_margins": 1.0})],
            "--metric eval_margin: the trials that finished have no finite value of it. Did you mean eval_margins? They have "
            "eval_margins. The same command with another --metric ranks them; nothing is trained again.",
        ),
    ],
)
def test_a_sweep_without_a_best_trial_says_why(outcomes: list[Outcome], message: str):
    with pytest.raises(ValueError) as error:
        require_best(ranked(outcomes, mode="max"), "eval_margin")
    assert str(error.value) == message


def test_csv_and_parquet_have_a_line_for_each_trial(tmp_path: Path):
    whole = finished(2, 0.25, lora_rank=4, lora_target_modules=["q", "v"])
    write_tables(Store.at(str(tmp_path)), ranked([finished(1, 0.5), whole, FAILED], mode="max"), "eval_m", seed=42)
    rows = pyarrow.parquet.read_table(tmp_path / "trials.parquet").to_pylist()
    assert rows[0] == {
        "beta": 0.1, "eval_m": 0.5, "number": 1, "seed": 42, "trial": "001_beta=0.1", "state": "finished", "steps": 8,
        "seconds": 2.0, "error": None, "folder": f"{tmp_path}/trials/001_beta=0.1", "best_step": 4, "best_eval_m": 1.5,
        "lora_rank": None, "lora_target_modules": None,
    }  # fmt: skip
    assert (rows[1]["lora_rank"], rows[1]["lora_target_modules"]) == (4, "q+v")
    assert (rows[2]["state"], rows[2]["error"]) == ("failed", "The loss is nan.")
    in_csv = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert [line["trial"] for line in in_csv] == [row["trial"] for row in rows]


def test_the_model_takes_the_place_of_an_earlier_one(tmp_path: Path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.bin").write_text(name)
    copy_model(Store.at(f"{tmp_path}/new"), Store.at(f"{tmp_path}/old"))
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["new.bin"]


def test_a_model_on_an_object_store_is_copied_there(bucket: Path):
    (bucket / "trial").mkdir()
    (bucket / "trial" / "a.bin").write_text("weights")
    copy_model(Store.at("s3://bucket/trial"), Store.at("s3://bucket/model"))
    assert (bucket / "model" / "a.bin").read_text() == "weights"
