"""What a sweep decides without a cluster: the scheduler, the trials' configurations, and whether a folder goes on."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import ALGORITHMS, DPO
from rayalign.config import command_line
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps import tune
from rayalign.sweeps.schedulers import asha_share, plan_in_words, scheduler_of
from rayalign.sweeps.search_checks import check_search
from rayalign.sweeps.sweep_folder import SEARCH_NOTE, check_sweep_folder, write_search
from rayalign.sweeps.trial_process import trial_config
from rayalign.sweeps.trials import Outcome, Trial


def base(folder: Path, **run: Any) -> Config:
    data, model = DataConfig(dataset=("a.jsonl",)), ModelConfig(model="m")
    return Config(DPO(), data=data, model=model, run=RunConfig(output_dir=str(folder), **run))


@pytest.mark.parametrize(
    ("changes", "num_steps", "scheduler"),
    [
        ({}, 150, "asha"),
        ({}, 100, "none"),  # two evaluations
        ({"num_samples": 3}, 150, "none"),
        ({"num_seeds": 2}, 150, "none"),
        ({"search": ("beta=grid:1,2",)}, 150, "none"),
        ({"scheduler": "median"}, 100, "median"),
        ({"scheduler": "none"}, 150, "none"),
    ],
)
def test_the_scheduler_is_asha_where_there_is_something_to_stop(
    tmp_path: Path, changes: dict[str, Any], num_steps: int, scheduler: str
):
    sweep = replace(TuneConfig(search=("beta=uniform:1:2",)), **changes)
    assert scheduler_of(sweep, check_search(base(tmp_path), sweep), num_steps) == scheduler


def test_asha_takes_the_steps_of_those_that_go_on():
    # 9 trials of 100 steps: 9 to step 10, 3 from there to 30, 1 to 90 and on to 100 (a third of it).
    assert asha_share(100, 10) == pytest.approx((10 + 20 / 3 + 60 / 9 + 10 / 27) / 100)
    assert asha_share(5, 10) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "The sweep: 8 trials; 16.0 GPU hours; with ASHA about 64% of the steps, 10.2 GPU hours"),
        ({"num_seeds": 3}, "The sweep: 24 trials (8 settings, 3 seeds); 48.0 GPU hours"),
        ({"search": ("beta=grid:1,2,3",)}, "The sweep: 3 trials; 6.0 GPU hours"),
        (
            {"price_per_hour": 2.5},
            "The sweep: 8 trials; 16.0 GPU hours (40.00 at 2.5 each); with ASHA about 64% of the steps, "
            "10.2 GPU hours (25.45 at 2.5 each)",
        ),
    ],
)
def test_the_plan_of_a_sweep_is_told(tmp_path: Path, changes: dict[str, Any], words: str):
    sweep = replace(TuneConfig(search=("beta=uniform:1:2",)), **changes)
    space = check_search(base(tmp_path, dry_run=True), sweep)  # evaluates each 50 steps: 50 + 60 / 3 of 110 steps
    assert plan_in_words(space, sweep, num_steps=110, gpu_hours=2.0) == words


def test_the_plan_of_a_sweep_has_the_shared_reference_once(tmp_path: Path):
    sweep = TuneConfig(search=("beta=grid:1,2,3",))
    told = plan_in_words(check_search(base(tmp_path), sweep), sweep, num_steps=110, gpu_hours=2.0, shared=0.25)
    assert told == "The sweep: 3 trials; 5.0 GPU hours"  # 0.5 and three times 1.5


def test_a_price_without_a_plan_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^--price_per_hour 2\.5: only --dry_run true tells costs\."):
        check_search(base(tmp_path), TuneConfig(search=("beta=uniform:1:2",), price_per_hour=2.5))


def test_a_trial_is_the_run_of_its_flags_in_its_own_folder(tmp_path: Path):
    space = check_search(base(tmp_path / "sweep", overwrite=True), TuneConfig(search=("beta=grid:1,2",)))
    trial = trial_config(space, {"beta": 2.0, "seed": 43}, Store.at(f"{tmp_path}/sweep/trials/001"))
    assert trial.to_dict() == {
        **space.base.to_dict(),
        "beta": 2.0,
        "seed": 43,
        "output_dir": f"{tmp_path}/sweep/trials/001",
        "cache_dir": f"{tmp_path}/.rayalign_cache",
        "overwrite": False,
        "eval_answers": 0,
    }


def test_flags_that_contradict_each_other_in_some_trial_are_refused_before_the_sweep(tmp_path: Path):
    sweep = TuneConfig(search=("use_dora=grid:false,true", "stack_adapter=grid:false,true"))
    with pytest.raises(ValueError) as error:
        tune.run(base(tmp_path), sweep)
    assert str(error.value) == (
        "--search gives a trial with use_dora=True stack_adapter=True, which can't be: --stack_adapter with --use_dora: a DoRA "
        "and another adapter can't be saved as one. Leave one of the two out."
    )


def test_a_model_that_only_some_trials_would_have_is_looked_for_before_the_sweep(tmp_path: Path, model_folder: Any):
    config = replace(base(tmp_path), model=ModelConfig(model=str(model_folder("llava"))))
    with pytest.raises(ValueError, match="nowhere"):
        tune.run(config, TuneConfig(search=(f"model=grid:{model_folder('llava')},{tmp_path}/nowhere",)))


def test_optuna_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError) as error:
        tune.run(base(tmp_path), TuneConfig(search=("beta=uniform:1:2",), search_alg="optuna"))
    assert str(error.value) == (
        '--search_alg optuna: Optuna is not installed. Run pip install "rayalign[tune]", or leave the flag out.'
    )


def finished(folder: Path, number: int, beta: float, value: float) -> Outcome:
    """A trial that finished, with a model."""
    trial = Trial(number, {"beta": beta})
    model = folder / "trials" / trial.name / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "adapter").write_text(f"beta {beta}")
    return Outcome(trial, "finished", value=value, last={"step": 1}, best={"step": 1}, steps=1, num_steps=1)


def test_the_best_trials_flags_run_as_they_are_into_a_folder_of_their_own(tmp_path: Path):
    space = check_search(base(tmp_path, overwrite=True, eval_answers=3), SWEEP)
    outcomes = [finished(tmp_path, 1, 1.25, 0.5), finished(tmp_path, 2, 1.75, 0.8)]
    sweep = tune._finish(space, SWEEP, Store.at(str(tmp_path)), outcomes)
    again = command_line.parse(ALGORITHMS, ["--config", f"{tmp_path}/best.yaml"], prog="x.py", description="")
    assert again == sweep.best
    assert "Trial 2 (beta=1.75)" in (tmp_path / "sweep.html").read_text()
    assert again.to_dict() == {
        **space.base.to_dict(),
        "beta": 1.75,
        "output_dir": f"{tmp_path}/best",
        "cache_dir": f"{tmp_path.parent}/.rayalign_cache",
        "overwrite": False,
    }


def test_the_best_trials_model_is_copied_when_another_one_is_the_best(tmp_path: Path):
    space, folder = check_search(base(tmp_path), SWEEP), Store.at(str(tmp_path))
    outcomes = [finished(tmp_path, 1, 1.25, 0.5), finished(tmp_path, 2, 1.75, 0.8)]
    tune._finish(space, SWEEP, folder, outcomes)
    assert (tmp_path / "model" / "adapter").read_text() == "beta 1.75"
    (tmp_path / "model" / "mark").touch()
    tune._finish(space, SWEEP, folder, outcomes)
    assert (tmp_path / "model" / "mark").exists()
    tune._finish(space, replace(SWEEP, mode="min"), folder, outcomes)
    assert [(file.name, file.read_text()) for file in (tmp_path / "model").iterdir()] == [("adapter", "beta 1.25")]


def test_the_best_of_losses_is_the_lowest_without_a_word_about_it(tmp_path: Path):
    space, sweep = check_search(base(tmp_path), SWEEP), replace(SWEEP, metric="eval_loss")
    outcomes = [finished(tmp_path, 1, 1.25, 0.5), finished(tmp_path, 2, 1.75, 0.8)]
    found = tune._finish(space, sweep, Store.at(str(tmp_path)), outcomes)
    assert [line["trial"] for line in found.trials] == ["001_beta=1.25", "002_beta=1.75"]
    assert (tmp_path / "model" / "adapter").read_text() == "beta 1.25"
    assert json.loads((tmp_path / "sweep.json").read_text())["mode"] == "min"
    assert "Ranked by eval_loss (min)." in (tmp_path / "sweep.html").read_text()


SWEEP = TuneConfig(search=("beta=uniform:1:2",))


def begun(folder: Path) -> Store:
    (folder / "trials" / "001_beta=1.5").mkdir(parents=True)
    write_search(Store.at(str(folder)), base(folder), SWEEP)
    return Store.at(str(folder))


@pytest.mark.parametrize("changes", [{}, {"num_samples": 32}, {"num_seeds": 3}, {"metric": "eval_loss", "mode": "min"}])
def test_a_sweep_goes_on_with_more_trials_and_other_rankings(tmp_path: Path, changes: dict[str, Any]):
    check_sweep_folder(begun(tmp_path / "a"), base(tmp_path / "a", logging_steps=1), replace(SWEEP, **changes))


def test_a_sweep_does_not_go_on_with_other_flags(tmp_path: Path):
    folder = begun(tmp_path / "a")
    other = replace(base(tmp_path / "a"), optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(ValueError) as error:
        check_sweep_folder(folder, other, replace(SWEEP, search=("beta=uniform:1:3",)))
    assert str(error.value) == (
        f"--output_dir {tmp_path}/a holds a sweep with other flags:\n"
        "  search: ['beta=uniform:1:2'] -> ['beta=uniform:1:3']\n"
        "  learning_rate: 5e-05 -> 0.001\n"
        "Pass --overwrite true to delete it, or another --output_dir."
    )


@pytest.mark.parametrize(
    "flags", [{"max_eval_records": 3}, {"load_best_model_at_end": True}, {"early_stopping_patience": 1}, {"eval_steps": 7}]
)
def test_a_sweep_goes_on_only_with_what_its_trials_were_ranked_by(tmp_path: Path, flags: dict[str, Any]):
    folder = begun(tmp_path / "a")
    other = base(tmp_path / "a", **flags)
    with pytest.raises(ValueError, match=f"holds a sweep with other flags:\n  {next(iter(flags))}: "):
        check_sweep_folder(folder, other, SWEEP)
    note = folder / SEARCH_NOTE
    note.write_json({name: value for name, value in note.read_json_object().items() if name not in flags})
    check_sweep_folder(folder, other, SWEEP)  # that of a version which did not compare it


def test_a_sweep_goes_on_in_the_type_that_its_trials_compute_in(tmp_path: Path):
    def on(gpus: float | None) -> Config:
        return replace(base(tmp_path), cluster=ClusterConfig(gpus_per_worker=gpus))

    (tmp_path / "trials" / "001").mkdir(parents=True)
    folder = Store.at(str(tmp_path))
    write_search(folder, on(1.0), SWEEP)
    check_sweep_folder(folder, on(None), SWEEP)  # before the cluster's GPUs are known
    check_sweep_folder(folder, on(1.0), SWEEP)
    with pytest.raises(ValueError, match="arithmetic: bfloat16 -> float32"):
        check_sweep_folder(folder, on(0.0), SWEEP)


def test_a_sweep_goes_on_with_the_texts_that_its_plugins_had(tmp_path: Path):
    before, edited = (replace(base(tmp_path), plugins=(Plugin("a.py", text),)) for text in ("FORMATS = ()", "FORMATS = []"))
    (tmp_path / "trials" / "001").mkdir(parents=True)
    write_search(Store.at(str(tmp_path)), before, SWEEP)
    check_sweep_folder(Store.at(str(tmp_path)), before, SWEEP)
    with pytest.raises(ValueError, match="texts of plugins: "):
        check_sweep_folder(Store.at(str(tmp_path)), edited, SWEEP)


def test_folders_of_earlier_versions_and_of_runs_are_refused(tmp_path: Path):
    (tmp_path / "old" / "trials" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a sweep of an earlier version, which can't go on"):
        check_sweep_folder(Store.at(f"{tmp_path}/old"), base(tmp_path / "old"), SWEEP)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("beta: 1\n")
    with pytest.raises(ValueError, match="holds a run"):
        check_sweep_folder(Store.at(f"{tmp_path}/run"), base(tmp_path / "run"), SWEEP)


def test_a_sweep_has_no_benchmarks_beside_its_trials(tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        tune.run(base(tmp_path, eval_benchmarks=("pope:data/pope",)), TuneConfig(search=("beta=grid:1,2",)))
    assert str(caught.value) == (
        "--eval_benchmarks: trials are ranked by their held-out records, and no benchmark is evaluated beside them. Leave it "
        "out, and evaluate the best model with the verb evaluate."
    )
