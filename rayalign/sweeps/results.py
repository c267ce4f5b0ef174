"""What comes out of a sweep: settings ranked by the mean of their seeds, a table, trials.csv and .parquet, the best model."""

import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from rayalign.config.flags import did_you_mean
from rayalign.config.tune import TuneConfig
from rayalign.report.drawn_trial import DrawnTrial
from rayalign.report.sweep_page import DrawnSweep, render_sweep
from rayalign.storage import Store
from rayalign.sweeps.importance import importance
from rayalign.sweeps.ranking import mode_of
from rayalign.sweeps.search_space import LISTED, parse_search
from rayalign.sweeps.trials import TRIALS, Outcome, short

SWEEP, BEST, BEST_MODEL, PAGE = "sweep.json", "best.yaml", "model", "sweep.html"
TABLES = ("trials.csv", "trials.parquet")

COSTS = ("eval_drift", "eval_nll_loss")
"""What a preference costs, where --cost_metric names nothing: the way from the reference, or the log-probs of good ones."""


@dataclass(frozen=True)
class Standing:
    """A setting with its trials, one for each seed."""

    outcomes: tuple[Outcome, ...]

    @property
    def number(self) -> int:
        return self.outcomes[0].trial.number

    @property
    def values(self) -> list[float]:
        """The ranking metric of each seed that has one."""
        return [outcome.value for outcome in self.outcomes if outcome.value is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def is_whole(self) -> bool:
        """Whether all seeds finished, with a value: only such settings can be the best."""
        return all(outcome.state == "finished" and outcome.value is not None for outcome in self.outcomes)

    @property
    def spread(self) -> dict[str, float]:
        """Lowest and highest value and their standard deviation (n - 1), where there are several."""
        if len(self.values) < 2:
            return {}
        return {"min": min(self.values), "max": max(self.values), "std": statistics.stdev(self.values)}

    @property
    def states(self) -> str:
        """In words: the state of all seeds, or of each kind how many."""
        states = [outcome.state for outcome in self.outcomes]
        kinds = list(dict.fromkeys(states))
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{states.count(kind)} {kind}" for kind in kinds)


def ranked(outcomes: Iterable[Outcome], *, mode: str) -> list[Standing]:
    """The settings, best first: those whose seeds all finished, then those with some value, then the others."""
    by_number: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        by_number.setdefault(outcome.trial.number, []).append(outcome)
    sign = -1 if mode == "max" else 1

    def place(standing: Standing) -> tuple[bool, bool, float, int]:
        mean = standing.mean
        return (not standing.is_whole, mean is None, 0 if mean is None else sign * mean, standing.number)

    return sorted((Standing(tuple(found)) for found in by_number.values()), key=place)


def require_best(standings: Sequence[Standing], metric: str) -> Standing:
    """The best setting; raises ValueError where no trial has the metric, or no setting's trials all finished."""
    if standings and standings[0].is_whole:
        return standings[0]
    outcomes = [outcome for standing in standings for outcome in standing.outcomes]
    failed = next((outcome for outcome in outcomes if outcome.error), None)
    finished = next((outcome for outcome in outcomes if outcome.state == "finished" and outcome.value is None), None)
    if finished is not None:
        known = sorted(name for name in finished.last if name != "step")
        raise ValueError(
            f"--metric {metric}: the trials that finished have no finite value of it.{did_you_mean(metric, known)} They have "
            f"{', '.join(known) or 'no evaluation: hold records out (--val_dataset)'}. The same command with another --metric "
            "ranks them; nothing is trained again."
        )
    raise ValueError(
        f"No setting has finished, so there is no best one. {failed.trial.words} failed: {failed.error}"
        if failed is not None
        else "No setting has finished, so there is no best one."
    )


def table(standings: Sequence[Standing], metric: str) -> str:
    """A line for each setting, best first; errors below."""
    failed = [outcome for standing in standings for outcome in standing.outcomes if outcome.error]
    return "\n".join(
        [aligned(table_rows(standings, metric)), *(f"{outcome.trial.words} failed: {outcome.error}" for outcome in failed)]
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table under each other, in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def table_rows(standings: Sequence[Standing], metric: str) -> list[list[str]]:
    """The heads and the rows of the table."""
    names = list(dict.fromkeys(name for standing in standings for name in standing.outcomes[0].trial.setting))
    with_spread = any(standing.spread for standing in standings)
    with_handed = any(outcome.handed for standing in standings for outcome in standing.outcomes)
    spread_heads = ("min", "max", "std", "seeds") if with_spread else ()
    rows = [["trial", *names, metric, *spread_heads, "steps", "state", *(("weights from",) if with_handed else ())]]
    for standing in standings:
        setting, spread = standing.outcomes[0].trial.setting, standing.spread
        values = [short(setting[name]) if name in setting else "-" for name in names]
        spreads = [*(figure(spread.get(name)) for name in ("min", "max", "std")), str(len(standing.values))]
        steps = max(outcome.steps for outcome in standing.outcomes)
        rows.append(
            [
                str(standing.number),
                *values,
                figure(standing.mean),
                *(spreads if with_spread else ()),
                str(steps),
                standing.states,
                *([handed_in_words(standing.outcomes[0])] if with_handed else ()),
            ]
        )
    return rows


def handed_in_words(outcome: Outcome) -> str:
    """Whose weights a trial got and the flags that it went on with, such as `3 at 20 (beta=0.12)`."""
    words = [
        f"{int(line['from'].partition('_')[0])} at {line['step']} "
        f"({' '.join(f'{name}={short(value)}' for name, value in line['flags'].items())})"
        for line in outcome.handed
    ]
    return "; ".join(words) or "-"


def page(folder: Store, standings: Sequence[Standing], sweep: TuneConfig, words: str) -> str:
    """sweep.html."""
    heads, *rows = table_rows(standings, sweep.metric)
    ranges = parse_search(sweep.search).items()
    outcomes = [outcome for standing in standings for outcome in standing.outcomes]
    cost = sweep.cost_metric or cost_of_all(outcomes)
    trials = [
        DrawnTrial(
            outcome.trial.words,
            outcome.state,
            {name: short(value) if isinstance(value, list) else value for name, value in outcome.flags.items()},
            outcome.value,
            outcome.points,
            outcome.sizes.get(cost),
            outcome.steps,
            outcome.num_steps,
        )
        for outcome in outcomes
    ]
    return render_sweep(
        DrawnSweep(
            title=folder.name,
            metric=sweep.metric,
            mode=mode_of(sweep),
            words=words,
            heads=heads,
            rows=rows,
            trials=trials,
            importance=importance(outcomes),
            cost_name=cost,
            is_log={name: values.kind == "loguniform" for name, values in ranges if values.kind not in LISTED},
        )
    )


def cost_of_all(outcomes: Sequence[Outcome]) -> str:
    """The metric that says what trials cost where --cost_metric names none: of COSTS the one that most trials have."""
    return max(COSTS, key=lambda name: sum(name in outcome.sizes for outcome in outcomes))


def uneven_in_words(outcomes: Iterable[Outcome]) -> str:
    """What to know where trials were not evaluated on the same number of records; empty where they were."""
    counts = {outcome.held_out for outcome in outcomes if outcome.held_out is not None}
    if len(counts) < 2:
        return ""
    return (
        f"Trials were evaluated on {min(counts)} to {max(counts)} held-out records, as what they search leaves out different "
        "ones: their figures are not of the same records"
    )


def saved_in_words(outcomes: Iterable[Outcome], scheduler: str) -> str:
    """How many steps stopped trials did not take; empty where none was stopped."""
    outcomes = list(outcomes)
    stopped = [outcome for outcome in outcomes if outcome.state == "stopped"]
    if not stopped:
        return ""
    taken = sum(outcome.steps for outcome in outcomes)
    saved = sum((outcome.num_steps or outcome.steps) - outcome.steps for outcome in stopped)
    return f"{scheduler} stopped {len(stopped)} of {len(outcomes)} trials: {saved} of {taken + saved} steps were not needed"


def trial_lines(standings: Iterable[Standing], metric: str, *, seed: int) -> list[dict[str, Any]]:
    """A line for each trial, best first, as sweep.json has it. `seed` is that of trials that name none."""
    return [
        {
            **outcome.trial.setting,
            **{name: value for name, value in outcome.flags.items() if outcome.handed},
            metric: outcome.value,
            "number": outcome.trial.number,
            "seed": outcome.trial.flags.get("seed", seed),
            "trial": outcome.trial.name,
            "state": outcome.state,
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "error": outcome.error,
        }
        for standing in standings
        for outcome in standing.outcomes
    ]


def setting_lines(standings: Iterable[Standing], metric: str) -> list[dict[str, Any]]:
    """A line for each setting, best first: its mean and spread over the seeds."""
    return [
        {**s.outcomes[0].trial.setting, "number": s.number, metric: s.mean, **s.spread, "seeds": len(s.values)}
        for s in standings
    ]


def write_tables(folder: Store, standings: Sequence[Standing], metric: str, *, seed: int) -> None:
    """trials.csv and trials.parquet: a line for each trial, best first, with the metrics of its last evaluation and, named
    best_..., those of its best one."""
    outcomes = [outcome for standing in standings for outcome in standing.outcomes]
    rows = []
    for line, outcome in zip(trial_lines(standings, metric, seed=seed), outcomes, strict=True):
        flags = {name: short(value) if isinstance(value, list) else value for name, value in line.items()}
        rows.append(
            {
                **flags,
                "folder": (folder / TRIALS / outcome.trial.name).location,
                **{name: value for name, value in outcome.last.items() if name not in (*flags, "step")},
                **{f"best_{name}": value for name, value in outcome.best.items()},
            }
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    found = pa.table({name: _column(values) for name, values in columns.items()})
    with tempfile.TemporaryDirectory() as temporary:
        pyarrow.csv.write_csv(found, Path(temporary) / TABLES[0])
        pyarrow.parquet.write_table(found, Path(temporary) / TABLES[1])
        for name in TABLES:
            (folder / name).write_bytes((Path(temporary) / name).read_bytes())


def copy_model(source: Store, target: Store) -> None:
    """Puts a trial's model in the place of the one that is there."""
    target.delete()
    local = source.local_path
    if local is not None:
        target.upload(local)
        return
    with tempfile.TemporaryDirectory() as temporary:
        source.download(Path(temporary))
        target.upload(Path(temporary))


def _column(values: list[Any]) -> pa.Array:
    """Whole numbers and fractions as fractions, where a column has both (a flag of several algorithms)."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1:
        values = [None if value is None else short(value) for value in values]
    return pa.array(values)


def figure(value: float | None) -> str:
    """A metric in four digits."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
