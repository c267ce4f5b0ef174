"""What a sweep tries: `--search` entries -> ranges, checked against the flags; a `SearchSpace` draws settings from them.

A setting is the searched flags with a value each. A flag that only some of the searched algorithms have is in their settings
only.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from rayalign.config.config import Config, config_from_mapping, section_types
from rayalign.config.flags import Flag, did_you_mean, flags_of
from rayalign.config.sections import ClusterConfig, RunConfig

if TYPE_CHECKING:
    from rayalign.algorithms import Algorithm

ALGORITHM = "rlhf_type"
"""The flag that is no section's: which algorithm trains."""

Kind = Literal["grid", "choice", "uniform", "loguniform", "quniform"]
LISTED = ("grid", "choice")

Setting: TypeAlias = dict[str, Any]
"""The searched flags of a trial, in the order of --search, with their values."""

SHOWN_DIGITS = 4
"""Significant digits of a drawn number: it is the same in the trial's name, its flags and every table."""


@dataclass(frozen=True)
class SearchRange:
    """The values that a sweep gives one flag: words for grid and choice, (low, high) for uniform and loguniform, (low, high,
    step) for quniform."""

    kind: Kind
    values: tuple[Any, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether every trial draws a value; a grid runs whole instead."""
        return self.kind != "grid"

    @property
    def step(self) -> float | None:
        """Between the numbers that can be drawn; None where any can."""
        return self.values[2] if self.kind == "quniform" else None

    @property
    def last(self) -> float:
        """The highest number that can be drawn: of quniform the last step up to `high`."""
        low, high, step = *self.values[:2], self.step
        if step is None:
            return float(high)
        return float(f"{low + step * math.floor((high - low) / step + 1e-9):.10g}")


@dataclass(frozen=True)
class SearchSpace:
    """The ranges of a sweep whose trials start from `base`, checked: every value of every range is one that its flag takes."""

    base: Config
    ranges: Mapping[str, SearchRange]

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The names of the algorithms that are tried."""
        return self.ranges[ALGORITHM].values if ALGORITHM in self.ranges else (self.base.algorithm.name,)

    def has(self, name: str, algorithm: str) -> bool:
        """Whether a searched flag is one of an algorithm's runs."""
        return name == ALGORITHM or name in searchable(class_of(self.base, algorithm))

    def flag(self, name: str, algorithm: str) -> Flag:
        """A searched flag as an algorithm has it."""
        return searchable(class_of(self.base, algorithm))[name]

    def value(self, name: str, algorithm: str, drawn: Any) -> Any:
        """A drawn word or number as the flag's value; a fraction has `SHOWN_DIGITS`, and stays in its range."""
        if name == ALGORITHM:
            return drawn
        flag, values = self.flag(name, algorithm), self.ranges[name]
        if values.kind in LISTED:
            value = flag.convert(drawn)
            return list(value) if isinstance(value, tuple) else value
        if flag.item_type is int:
            return int(drawn)
        if values.kind == "quniform":
            return float(f"{drawn:.10g}")
        return min(max(float(f"{drawn:.{SHOWN_DIGITS}g}"), values.values[0]), values.values[1])

    def settings(self, num_samples: int, seed: int) -> list[Setting]:
        """The different settings of `num_samples` draws, each with every combination of the grids. Those of fewer draws are the
        first ones of more."""
        generator = random.Random(seed)
        is_drawn = any(values.is_drawn for values in self.ranges.values())
        grids = {name: values.values for name, values in self.ranges.items() if not values.is_drawn}
        found: list[Setting] = []
        for _ in range(num_samples if is_drawn else 1):
            drawn = {name: self.draw(name, generator) for name, values in self.ranges.items() if values.is_drawn}
            for combination in itertools.product(*grids.values()):
                setting = self.setting({**drawn, **dict(zip(grids, combination, strict=True))})
                if setting not in found:
                    found.append(setting)
        return found

    def setting(self, drawn: Mapping[str, Any]) -> Setting:
        """The setting that drawn words and numbers are: of its algorithm's flags."""
        algorithm = drawn.get(ALGORITHM, self.base.algorithm.name)
        return {
            name: self.value(name, algorithm, drawn[name])
            for name in self.ranges
            if name in drawn and self.has(name, algorithm)
        }

    def config(self, setting: Mapping[str, Any]) -> Config:
        """The run of a setting. To another algorithm than the base's go its general flags, and those of its own that differ
        from their defaults, where the other one has them.

        Raises ValueError for values that contradict each other.
        """
        base, values = self.base, {name: value for name, value in setting.items() if name != ALGORITHM}
        name = setting.get(ALGORITHM, base.algorithm.name)
        if name == base.algorithm.name:
            return base.replace(values)
        algorithm = class_of(base, name)
        own = {flag.name for flag in flags_of(type(base.algorithm))}
        known, changed = {flag.name for flag in flags_of(algorithm)}, changed_flags(base)
        given = {flag: value for flag, value in base.to_dict().items() if flag not in own or flag in known & changed}
        return config_from_mapping(algorithm, {**given, **values}, plugins=base.plugins)

    def draw(self, name: str, generator: random.Random) -> Any:
        """A word or number of a flag's range."""
        values = self.ranges[name]
        if values.kind == "choice":
            return generator.choice(values.values)
        low, high = values.values[:2]
        owner = next(algorithm for algorithm in self.algorithms if self.has(name, algorithm))
        is_whole = self.flag(name, owner).item_type is int
        if values.step is not None:
            return low + values.step * generator.randint(0, round((values.last - low) / values.step))
        if values.kind == "uniform":
            return generator.randint(int(low), int(high)) if is_whole else generator.uniform(low, high)
        if is_whole:  # half a number more on both sides, so that the first and the last get their share
            drawn = round(math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5))))
            return min(max(drawn, int(low)), int(high))
        return math.exp(generator.uniform(math.log(low), math.log(high)))


def parse_search(entries: Iterable[str]) -> dict[str, SearchRange]:
    """Reads entries such as beta=grid:0.05,0.1 or learning_rate=loguniform:1e-6:1e-4; raises ValueError for others."""
    ranges: dict[str, SearchRange] = {}
    for entry in entries:
        name, equals, spec = entry.partition("=")
        kind, colon, rest = spec.partition(":")
        if not (name and equals and colon and rest):
            raise ValueError(f"--search {entry}: must look like beta=grid:0.05,0.1,0.5 or learning_rate=loguniform:1e-6:1e-4.")
        if name in ranges:
            raise ValueError(f"--search {entry}: {name} is searched twice.")
        ranges[name] = _parse_range(entry, kind, rest)
    return ranges


def _parse_range(entry: str, kind: str, rest: str) -> SearchRange:
    match kind:
        case "grid" | "choice":
            words = tuple(word.strip() for word in rest.split(","))
            if not all(words) or len(set(words)) < len(words):
                raise ValueError(
                    f"--search {entry}: {kind} takes different values with commas between, such as {kind}:0.1,0.5."
                )
            return SearchRange(kind, words)
        case "uniform" | "loguniform":
            low, high = _numbers(entry, kind, rest, 2, "two numbers, such as {kind}:0.01:1")
            least, least_in_words = (0.0, " above 0") if kind == "loguniform" else (-math.inf, "")
            if not least < low < high < math.inf:
                raise ValueError(f"--search {entry}: {kind} takes two finite numbers{least_in_words}, the lower one first.")
            return SearchRange(kind, (low, high))
        case "quniform":
            low, high, step = _numbers(entry, kind, rest, 3, "a low and a high number and a step, such as {kind}:0:2:0.5")
            if not (-math.inf < low < high < math.inf and 0 < step <= high - low):
                raise ValueError(
                    f"--search {entry}: quniform takes finite numbers, the lower one first, and a step above 0 that fits "
                    "between them."
                )
            return SearchRange(kind, (low, high, step))
    kinds = get_args(Kind)
    raise ValueError(f"--search {entry}: {kind} is not one of {', '.join(kinds)}.{did_you_mean(kind, kinds)}")


def _numbers(entry: str, kind: str, rest: str, count: int, wanted: str) -> list[float]:
    try:
        numbers = [float(word) for word in rest.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"--search {entry}: {kind} takes {wanted.format(kind=kind)}.")
    return numbers


def algorithms_of(config: Config) -> "dict[str, type[Algorithm]]":
    """All algorithms by name: ours, and those of plugins."""
    from rayalign.algorithms import ALGORITHMS

    brought = {name: algorithm for plugin in config.plugins for name, algorithm in plugin.algorithms.items()}
    return {**ALGORITHMS, **brought}


def class_of(config: Config, algorithm: str) -> "type[Algorithm]":
    """The algorithm of a name, as the configuration's runs have it."""
    return type(config.algorithm) if algorithm == config.algorithm.name else algorithms_of(config)[algorithm]


def searchable(algorithm: "type[Algorithm]") -> dict[str, Flag]:
    """The flags of an algorithm's runs that may differ between trials."""
    sections = [section for section in section_types(algorithm) if section not in (RunConfig, ClusterConfig)]
    return {flag.name: flag for section in sections for flag in flags_of(section)}


def changed_flags(config: Config) -> set[str]:
    """The algorithm's own flags that differ from their defaults."""
    algorithm = config.algorithm
    return {flag.name for flag in flags_of(type(algorithm)) if getattr(algorithm, flag.name) != flag.default}
