"""The trials of a sweep: which there are, their folders, and what a folder says of its trial: state, metrics, error.

A trial's folder is named by its setting, so that the same command finds it again.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rayalign.storage import Store
from rayalign.sweeps.search_space import Setting
from rayalign.training.metric_names import EVALUATED
from rayalign.training.metrics import read_metrics

TRIALS = "trials"
TRIAL_NOTE, STOPPED_NOTE, FAILED_NOTE = "trial.json", "stopped.json", "failed.json"
LONGEST_NAME = 100
HANDED_NOTE = "handed_over.json"
"""In the folder of a population's trial, a list: at which `step` it got the weights of which trial (`from`), and the `flags`
with which it went on."""

State = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class Trial:
    """The run of a setting, whose `number` is counted from 1, with a seed; None is the seed that all trials have."""

    number: int
    setting: Setting
    seed: int | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that it differs by."""
        return self.setting if self.seed is None else {**self.setting, "seed": self.seed}

    @property
    def words(self) -> str:
        """Its number and values, as the log shows them."""
        values = " ".join(f"{name}={short(value)}" for name, value in self.flags.items())
        return f"Trial {self.number} ({values})"

    @property
    def name(self) -> str:
        """Its folder's: such as 003_beta=0.1_simpo_gamma=0.5."""
        parts = [f"{name}={re.sub('[^A-Za-z0-9.+-]', '-', short(value))}" for name, value in self.setting.items()]
        seed = "" if self.seed is None else f"_seed={self.seed}"
        return "_".join([f"{self.number:03d}", *parts])[:LONGEST_NAME] + seed

    def to_dict(self) -> dict[str, Any]:
        """What trial.json holds."""
        return {"number": self.number, "flags": self.setting, "seed": self.seed}


@dataclass(frozen=True)
class Outcome:
    """What a trial came to. `last` and `best` are the held-out metrics of its last and of its best evaluation; `value` is the
    metric that ranks trials, at the end, None where there is none that is finite; `points` are the metric at each evaluation,
    by step. `sizes` are those of the held-out metrics at the same step as the value, for what it cost; `handed` are the lines
    of HANDED_NOTE; `held_out` is how many records it was evaluated on."""

    trial: Trial
    state: State
    value: float | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    num_steps: int | None = None
    seconds: float | None = None
    error: str | None = None
    points: tuple[tuple[float, float], ...] = ()
    handed: Sequence[Mapping[str, Any]] = ()
    held_out: int | None = None

    @property
    def flags(self) -> Mapping[str, Any]:
        """The flags that it differs by, those of its end where they have changed."""
        return self.handed[-1]["flags"] if self.handed else self.trial.flags

    @property
    def has_ended(self) -> bool:
        """Whether it is not to be run again: it finished, or was stopped as one of the worse."""
        return self.state in ("finished", "stopped")


def short(value: Any) -> str:
    """A flag's value in few characters."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(short, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def trials_of(settings: Iterable[Setting], *, first_seed: int, num_seeds: int, start: int = 1) -> list[Trial]:
    """A trial for each setting and seed. The first seed is that of a sweep of one seed, whose trials are the same then."""
    return [
        Trial(number, setting, None if index == 0 else first_seed + index)
        for number, setting in enumerate(settings, start)
        for index in range(num_seeds)
    ]


def known_settings(folder: Store) -> list[Setting]:
    """The settings of the trials that a sweep has begun, in their order; raises ValueError for a folder that tells none."""
    found: dict[int, Setting] = {}
    for trial in (folder / TRIALS).list():
        note = trial / TRIAL_NOTE
        if note.exists():
            content = note.read_json_object()
            found[content["number"]] = content["flags"]
    numbers = sorted(found)
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(
            f"{(folder / TRIALS).location} lacks some of the sweep's trials: it has the numbers {numbers}. Bring them back, or "
            "pass --overwrite true to start anew."
        )
    return [found[number] for number in numbers]


def read_outcome(folder: Store, trial: Trial, *, metric: str, mode: str) -> Outcome:
    """What a trial's folder says of it."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 0]
    state, note = _state(folder)
    ranked = [line for line in lines if math.isfinite(line.get(metric, math.nan))]
    sign = 1 if mode == "max" else -1
    best = max(ranked, key=lambda line: sign * line[metric])["step"] if ranked else 0  # the earliest of equal ones
    steps = max((int(line["step"]) for line in lines), default=0)
    value = ranked[-1][metric] if ranked else None
    if state == "finished":  # the summary is of the step that model/ is of
        value = note[metric] if math.isfinite(note.get(metric, math.nan)) else None
    last = _evaluation(lines, steps)
    at_end = {name: value for name, value in {**last, **note}.items() if name.startswith(EVALUATED)}
    return Outcome(
        trial,
        state,
        value=value,
        sizes={name: abs(value) for name, value in at_end.items() if math.isfinite(value)},
        last=last,
        best=_evaluation(lines, best),
        steps=steps,
        num_steps=note.get("num_steps", steps),
        seconds=note.get("seconds"),
        error=note.get("error"),
        points=tuple((line["step"], line[metric]) for line in ranked),
        handed=read_handed(folder),
        held_out=note.get("held_out_records"),
    )


def read_handed(folder: Store) -> list[dict[str, Any]]:
    """The lines of a trial's HANDED_NOTE."""
    note = folder / HANDED_NOTE
    return list(note.read_json()) if note.exists() else []


def _state(folder: Store) -> tuple[State, Mapping[str, Any]]:
    """A trial's state, and what the note that tells it holds."""
    notes: Mapping[State, str] = {"finished": "summary.json", "stopped": STOPPED_NOTE, "failed": FAILED_NOTE}
    for state, name in notes.items():
        if (folder / name).exists():
            return state, (folder / name).read_json_object()
    return "unfinished", {}


def _evaluation(lines: Sequence[Mapping[str, float]], step: float) -> dict[str, float]:
    """The step and the held-out metrics of the last evaluation up to a step."""
    found: dict[str, float] = {}
    for line in lines:
        held_out = {name: value for name, value in line.items() if name.startswith(EVALUATED)}
        if held_out and found.get("step", 0) <= line["step"] <= step:
            found = {**(found if found.get("step") == line["step"] else {}), "step": line["step"], **held_out}
    return found


class Queue:
    """The trials still to run, and the outcomes of all by the trials' names. `propose` gives more trials where none is waiting,
    by the outcomes so far; none when there will be no more."""

    def __init__(
        self,
        trials: Iterable[Trial],
        read: Callable[[Trial], Outcome],
        *,
        propose: Callable[[list[Outcome]], list[Trial]] = lambda outcomes: [],
    ) -> None:
        self.outcomes: dict[str, Outcome] = {trial.name: read(trial) for trial in trials}
        self._waiting = [outcome.trial for outcome in self.outcomes.values() if not outcome.has_ended]
        self._read, self._propose = read, propose

    @property
    def num_waiting(self) -> int:
        """Trials that have not been handed out yet, as far as they are known."""
        return len(self._waiting)

    def next(self) -> Trial | None:
        """The next trial to run."""
        if not self._waiting:
            self._waiting = list(self._propose(list(self.outcomes.values())))
        if not self._waiting:
            return None
        trial = self._waiting.pop(0)
        self.outcomes[trial.name] = Outcome(trial, "unfinished")
        return trial

    def ended(self, trial: Trial) -> Outcome:
        """Notes what a trial came to."""
        self.outcomes[trial.name] = self._read(trial)
        return self.outcomes[trial.name]
