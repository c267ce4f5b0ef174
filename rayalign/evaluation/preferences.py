"""Metrics of scored pairs: how often each scorer prefers the chosen response and by how much, on which records, whether it
looks at the pictures, whether it follows length; and two models side by side on the same records."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayalign.evaluation.score_columns import SIDES, VIEWS, scored_column, scorers_in
from rayalign.evaluation.statistics import (
    Difference,
    Discordant,
    Estimate,
    Floats,
    estimate,
    length_bias,
    mcnemar,
    paired_difference,
    wins,
)

LIKELIHOOD, PER_TOKEN, IMPLICIT_REWARD, REWARD_MODEL = "likelihood", "per_token", "implicit_reward", "reward_model"
"""Scorers: the sum of a response's log-probs, their mean, beta (log p - log p of the reference), a value head."""

SCORERS = {
    LIKELIHOOD: "likelihood, summed",
    PER_TOKEN: "likelihood, per token",
    IMPLICIT_REWARD: "implicit reward",
    REWARD_MODEL: "reward model",
}
"""The scorers in words."""

ENSEMBLE = "ensemble"
"""All scorers of --scorer together, where there are several."""

LENGTHS = (32, 64, 128, 256, 512)
"""Tokens of the longer response up to which a group of lengths goes."""

CHARACTERS = tuple(4 * tokens for tokens in LENGTHS)
"""The same in characters, where no model counts tokens."""

DEFAULT_BETA = 0.1

MOST_PICTURES = 3

Metric = Estimate | float
Groups = Mapping[str, Mapping[str, Mapping[str, Estimate]]]
"""By kind (source, tokens, pictures) and group: the accuracies and margins of the group's records."""


@dataclass(frozen=True)
class Pairs:
    """Scored pairs, one a position: `columns` of `score_columns.SCHEMA`, or of `scored_schema`, as floats, nan where there is
    none. `not_finite`: ids of those whose scores are no numbers, which are not among them. `given`: the scorers of --scorer,
    where these scored them and no model."""

    ids: tuple[str, ...]
    columns: Mapping[str, Floats]
    not_finite: tuple[str, ...]
    beta: float
    is_reward_model: bool
    given: tuple[str, ...] = ()
    ensemble: str = "mean"

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(self.margins())

    @property
    def chief(self) -> str:
        """The scorer that stands nearest to the model's training; of those of --scorer all together."""
        if self.given:
            return self.scorers[-1]
        return next(name for name in (REWARD_MODEL, IMPLICIT_REWARD, LIKELIHOOD) if name in self.scorers)

    @property
    def unit(self) -> str:
        """What responses are measured in."""
        return "characters" if self.given else "tokens"

    def lengths(self, side: str) -> Floats:
        """Of the responses of a side, in `unit`s."""
        return self.columns[f"{side}_{self.unit}"]

    def scores(self, side: str) -> Floats:
        """Of the responses of a side by the chief scorer, as far as it scores responses alone."""
        if self.given:
            return self._given(side)[self.chief]
        whole = self.columns[side]
        return self.beta * (whole - self.columns[f"reference_{side}"]) if self.chief == IMPLICIT_REWARD else whole

    def _given(self, side: str) -> dict[str, Floats]:
        """The scores of --scorer's, and of all together."""
        found = {name: self.columns[scored_column(name, side)] for name in self.given}
        if len(found) > 1:
            together = np.min if self.ensemble == "min" else np.mean
            found[ENSEMBLE] = together(list(found.values()), axis=0)
        return found

    def margins(self, view: str = "") -> dict[str, Floats]:
        """By scorer, how much higher the chosen response scores; with wrong pictures for a view, nan where a pair has none."""
        if self.given:
            better, worse = (self._given(side) for side in SIDES)
            return {name: better[name] - worse[name] for name in ({} if view else better)}
        prefix = f"{view}_" if view else ""
        chosen, rejected = self.columns[f"{prefix}chosen"], self.columns[f"{prefix}rejected"]
        if self.is_reward_model:
            return {REWARD_MODEL: chosen - rejected}
        found = {
            LIKELIHOOD: chosen - rejected,
            PER_TOKEN: chosen / self.columns["chosen_tokens"] - rejected / self.columns["rejected_tokens"],
        }
        sides = [self.columns[f"reference_{prefix}{side}"] for side in ("chosen", "rejected")]
        if not np.isnan(self.columns["reference_chosen"]).all():
            found[IMPLICIT_REWARD] = self.beta * ((chosen - sides[0]) - (rejected - sides[1]))
        return found

    def take(self, ids: Sequence[str]) -> "Pairs":
        """Those with some ids, in this order."""
        places = {own: place for place, own in enumerate(self.ids)}
        chosen = np.array([places[own] for own in ids], dtype=np.int64)
        return dataclasses.replace(
            self, ids=tuple(ids), columns={name: column[chosen] for name, column in self.columns.items()}
        )


def pairs_of(table: pa.Table, *, beta: float = DEFAULT_BETA, ensemble: str = "mean") -> Pairs:
    """The pairs of a pool's results, by their column `id`: of a model's `score_columns.SCHEMA`, or of a `scored_schema`. Raises
    ValueError where there is a reference and none of its scores is a number."""
    ids = table["id"].to_pylist()
    columns = {
        name: table[name].cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        for name in table.column_names
        if pa.types.is_floating(table[name].type) or pa.types.is_integer(table[name].type)
    }
    given = scorers_in(table.schema)
    if not given and table["reference_chosen"].null_count < len(ids) and np.isnan(columns["reference_chosen"]).all():
        raise ValueError(
            "The reference has given no record a score that is a number. Is it damaged? --ref_model names another."
        )
    whole = Pairs(tuple(ids), columns, (), beta, is_of_reward_model(table), given, ensemble)
    finite = np.all([np.isfinite(margins) for margins in whole.margins().values()], axis=0)
    kept = whole.take([own for own, good in zip(ids, finite, strict=True) if good])
    return dataclasses.replace(kept, not_finite=tuple(own for own, good in zip(ids, finite, strict=True) if not good))


def is_of_reward_model(table: pa.Table) -> bool:
    """Whether a pool's results are a reward model's."""
    name = "is_reward_model"
    return bool(name in table.column_names and table.num_rows and table[name][0].as_py())


def preference_metrics(pairs: Pairs, *, seed: int) -> dict[str, Metric]:
    """All metrics of some pairs, by name. Raises ValueError where there is none."""
    found: dict[str, Metric] = {}
    for scorer, margins in pairs.margins().items():
        found[f"accuracy/{scorer}"] = estimate(wins(margins), seed=seed)
        found[f"margin/{scorer}"] = estimate(margins, seed=seed)
    for view in VIEWS:
        for scorer, margins in pairs.margins(view).items():
            seen = np.isfinite(margins)
            if not seen.any():
                continue
            right, wrong = wins(pairs.margins()[scorer][seen]), wins(margins[seen])
            found[f"accuracy/{scorer}/{view}"] = estimate(wrong, seed=seed)
            if view == "shuffled":
                found[f"image_reliance/{scorer}"] = estimate(right - wrong, seed=seed)
    if IMPLICIT_REWARD in pairs.scorers:
        found["drift"] = estimate(pairs.columns["chosen"] - pairs.columns["reference_chosen"], seed=seed)
    kl = pairs.columns.get("kl", np.empty(0))
    sampled = kl[np.isfinite(kl)]
    if len(sampled):
        found["kl"] = estimate(sampled, seed=seed)
    return found | _length_metrics(pairs, seed=seed)


def _length_metrics(pairs: Pairs, *, seed: int) -> dict[str, Metric]:
    chief = pairs.chief
    extra = pairs.lengths("chosen") - pairs.lengths("rejected")
    bias = length_bias(pairs.margins()[chief], extra, seed=seed)
    found: dict[str, Metric] = {"accuracy/by_length_alone": bias.by_length_alone}
    if not math.isnan(bias.correlation):
        found[f"length_correlation/{chief}"] = bias.correlation
    for name, value in (("chosen_longer", bias.longer), ("chosen_shorter", bias.shorter)):
        if value is not None:
            found[f"accuracy/{chief}/{name}"] = value
    return found


def group_metrics(pairs: Pairs, *, seed: int) -> Groups:
    """The accuracies and margins by source, by length and by number of pictures, of each kind that has several groups."""
    kinds = {
        "source": [own.rpartition(":")[0] for own in pairs.ids],
        pairs.unit: [
            length_group(float(n), CHARACTERS if pairs.given else LENGTHS)
            for n in np.maximum(pairs.lengths("chosen"), pairs.lengths("rejected"))
        ],
        "pictures": [picture_group(int(n)) for n in pairs.columns["num_images"]],
    }
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for kind, names in kinds.items():
        if len(set(names)) < 2:
            continue
        found[kind] = {
            name: {
                f"{kind}/{scorer}": estimate(values[np.array([own == name for own in names])], seed=seed)
                for scorer, margins in pairs.margins().items()
                for kind, values in (("accuracy", wins(margins)), ("margin", margins))
            }
            for name in sorted(set(names), key=_in_order)
        }
    return found


def length_group(length: float, bounds: Sequence[int] = LENGTHS) -> str:
    """The group of a response of so many tokens, or in what else the bounds are."""
    lower = 1
    for upper in bounds:
        if length <= upper:
            return f"{lower} to {upper}"
        lower = upper + 1
    return f"above {bounds[-1]}"


def picture_group(number: int) -> str:
    """The group of a record with so many pictures."""
    return str(number) if number < MOST_PICTURES else f"{MOST_PICTURES} and more"


def _in_order(name: str) -> tuple[int, str]:
    """Groups of numbers by their lowest one, `above` last; others by name."""
    first = name.split(" ")[0]
    return (int(first), name) if first.isdigit() else (2**31, name)


@dataclass(frozen=True)
class Comparison:
    """Two models on the `records` that both scored: by scorer McNemar's test of their accuracies, and the paired bootstrap of
    their margins where both are in the same unit."""

    records: int
    accuracies: Mapping[str, Discordant]
    accuracy_differences: Mapping[str, Difference]
    margins: Mapping[str, Difference]


def compare(first: Pairs, second: Pairs, *, seed: int) -> Comparison:
    """The comparison of two models by the scorers that both have; where they share none, by the one nearest to each's training.
    Raises ValueError where they have no record in common."""
    there = set(second.ids)
    both = [own for own in first.ids if own in there]
    if not both:
        raise ValueError("The two models have scored no record in common, so they can't be compared.")
    a, b = first.take(both), second.take(both)
    shared = [scorer for scorer in a.scorers if scorer in b.scorers]
    pairs = {s: (a.margins()[s], b.margins()[s]) for s in shared}
    if not shared:
        pairs = {f"{a.chief} against {b.chief}": (a.margins()[a.chief], b.margins()[b.chief])}
    return Comparison(
        records=len(both),
        accuracies={name: mcnemar(wins(one), wins(other)) for name, (one, other) in pairs.items()},
        accuracy_differences={
            name: paired_difference(wins(one), wins(other), seed=seed) for name, (one, other) in pairs.items()
        },
        margins={name: paired_difference(*pairs[name], seed=seed) for name in shared},
    )
