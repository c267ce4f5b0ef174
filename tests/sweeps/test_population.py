"""A population's trials without a cluster: which flags may change and how, and weights that change hands in the folders."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import RunConfig
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.handover import pack, take_over
from rayalign.sweeps.population import check_population, explore
from rayalign.sweeps.results import ranked, table
from rayalign.sweeps.search_checks import check_search
from rayalign.sweeps.search_space import SearchSpace
from rayalign.sweeps.trials import Outcome, Trial, read_handed
from rayalign.training.run_folder import check_run_folder, open_run

PBT = TuneConfig(search=("beta=loguniform:0.01:1", "learning_rate=uniform:0.1:1"), scheduler="pbt")


def space_of(sweep: TuneConfig) -> SearchSpace:
    return check_search(Config(DPO()), sweep)


def test_flags_change_a_little_or_are_drawn_anew_within_their_ranges():
    space, generator = space_of(PBT), random.Random(1)
    sampled = {"trial": {"name": "001", "flags": {"beta": 0.9, "learning_rate": 0.5}}}
    changed = [explore(space, sampled, generator)["trial"]["flags"] for _ in range(60)]
    assert sampled["trial"]["flags"] == {"beta": 0.9, "learning_rate": 0.5}
    betas, rates = ([flags[name] for flags in changed] for name in ("beta", "learning_rate"))
    assert {0.72, 1.0} < set(betas)  # times 0.8, and times 1.25 up to the range's end
    assert {0.4, 0.625} < set(rates)
    assert all(0.01 <= beta <= 1 for beta in betas)
    assert len({*betas} - {0.72, 1.0}) > 5


@pytest.mark.parametrize(
    ("changes", "apart", "words"),
    [
        ({"search": ("beta=grid:1,2",)}, None, "--search beta=grid: flags change while trials run"),
        ({"search": ("lora_dropout=uniform:0.1:0.2",)}, None, "--search lora_dropout=uniform: flags change while trials run"),
        ({"num_samples": 1}, None, "takes --num_samples of at least 2"),
        ({"num_seeds": 2}, None, "takes --num_samples of at least 2, --search_alg random, one seed"),
        ({}, "--num_workers is 2", "trials hand weights over between processes of one worker, and can't here: --num_workers"),
    ],
)
def test_what_can_not_change_while_a_run_goes_on_is_refused(changes: dict[str, Any], apart: str | None, words: str):
    sweep = replace(PBT, **changes)
    with pytest.raises(ValueError) as error:
        check_population(space_of(sweep), sweep, apart=apart)
    assert words in str(error.value)
    check_population(space_of(PBT), PBT, apart=None)


@pytest.mark.parametrize("flags", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_what_looks_back_on_one_runs_evaluations_is_refused(flags: dict[str, Any]):
    space = check_search(Config(DPO(), run=RunConfig(**flags)), PBT)
    with pytest.raises(ValueError, match="a trial goes on with another one's weights"):
        check_population(space, PBT, apart=None)


def checkpoint_in(folder: Path, text: str) -> Path:
    """A checkpoint's files, as far as a run's folder looks at them."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_text(text)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_another_trials_weights_become_the_newest_checkpoint_and_its_flags_the_runs(tmp_path: Path):
    def member(beta: float) -> Config:
        return Config(DPO(beta=beta), run=RunConfig(output_dir=str(tmp_path / "002")))

    open_run(member(0.5))
    checkpoint_in(tmp_path / "002" / "checkpoints" / "step_00000010_aaaaaaaa", "own")
    (tmp_path / "carried").mkdir()
    pack(Store.at(str(checkpoint_in(tmp_path / "giver", "theirs"))), tmp_path / "carried", name="001_beta=0.1", step=20)
    with pytest.raises(ValueError, match="another configuration"):
        check_run_folder(member(0.125))

    take_over(member(0.125), str(tmp_path / "carried"), name="002", flags={"beta": 0.125})
    (checkpoint,) = (tmp_path / "002" / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step_00000020_")
    assert (checkpoint / "weights.safetensors").read_text() == "theirs"
    assert read_handed(Store.at(f"{tmp_path}/002")) == [{"step": 20, "from": "001_beta=0.1", "flags": {"beta": 0.125}}]
    check_run_folder(member(0.125))  # the run goes on with the new flags


def test_a_trial_that_was_only_set_aside_keeps_what_it_has(tmp_path: Path):
    (tmp_path / "carried").mkdir()
    pack(Store.at(str(checkpoint_in(tmp_path / "giver", "own"))), tmp_path / "carried", name="002", step=20)
    config = Config(DPO(), run=RunConfig(output_dir=str(tmp_path / "002")))
    take_over(config, str(tmp_path / "carried"), name="002", flags={})
    assert not (tmp_path / "002").exists()


def test_the_table_tells_whose_weights_a_trial_got():
    line = {"step": 20, "from": "001_beta=0.1", "flags": {"beta": 0.125}}
    outcomes = [
        Outcome(Trial(1, {"beta": 0.1}), "finished", value=0.5, steps=40),
        Outcome(Trial(2, {"beta": 0.5}), "finished", value=0.7, steps=40, handed=[line]),
    ]
    assert outcomes[1].flags == {"beta": 0.125}
    assert table(ranked(outcomes, mode="max"), "eval_m") == (
        "trial  beta  eval_m  steps  state     weights from\n"
        "2      0.5   0.7     40     finished  1 at 20 (beta=0.125)\n"
        "1      0.1   0.5     40     finished  -"
    )
