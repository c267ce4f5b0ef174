"""What a sweep tries: `--search` entries -> ranges, checked against the flags; `tune` turns them into Ray Tune's space."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rayalign.config.config import Config, section_types
from rayalign.config.flags import Flag, did_you_mean, flags_of
from rayalign.config.sections import ClusterConfig, RunConfig, TuneConfig

Kind = Literal["grid", "choice", "uniform", "loguniform"]


@dataclass(frozen=True)
class SearchRange:
    """The values that a sweep gives one flag: words for grid and choice, (low, high) for uniform and loguniform."""

    kind: Kind
    values: tuple[str, ...] | tuple[float, float]

    @property
    def is_drawn(self) -> bool:
        """Whether every trial draws a value; a grid runs whole instead."""
        return self.kind != "grid"


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


def check_search(config: Config, tune: TuneConfig) -> dict[str, SearchRange]:
    """The ranges of a sweep; raises ValueError for a value that its flag does not take."""
    if not tune.search:
        raise ValueError("--search is empty: name at least one flag to search, such as --search beta=grid:0.05,0.1,0.5.")
    ranges = parse_search(tune.search)
    fixed = {flag.name for section in (RunConfig, ClusterConfig) for flag in flags_of(section)}
    flags = {f.name: f for s in section_types(type(config.algorithm)) for f in flags_of(s) if f.name not in fixed}
    for name, values in ranges.items():
        if name in fixed:
            raise ValueError(f"--search {name}: is the same for all trials of a sweep; pass --{name} itself.")
        if name not in flags:
            raise ValueError(f"--search {name}: there is no such flag.{did_you_mean(name, flags)}")
        _check_values(config, flags, name, values)
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
            try:
                low, high = (float(word) for word in rest.split(":"))
            except ValueError:
                raise ValueError(f"--search {entry}: {kind} takes two numbers, such as {kind}:0.01:1.") from None
            least, least_in_words = (0.0, " above 0") if kind == "loguniform" else (-math.inf, "")
            if not least < low < high < math.inf:
                raise ValueError(f"--search {entry}: {kind} takes two finite numbers{least_in_words}, the lower one first.")
            return SearchRange(kind, (low, high))
    kinds = get_args(Kind)
    raise ValueError(f"--search {entry}: {kind} is not one of {', '.join(kinds)}.{did_you_mean(kind, kinds)}")


def _check_values(config: Config, flags: Mapping[str, Flag], name: str, values: SearchRange) -> None:
    if values.kind in ("uniform", "loguniform") and flags[name].item_type is not float:
        raise ValueError(f"--search {name}={values.kind}: --{name} takes no fractions; use grid or choice.")
    for value in values.values:
        try:
            config.replace({name: value})
        except ValueError as error:
            raise ValueError(f"--search {name}={values.kind}: {error}") from None
