"""The page of a training run: one HTML file with its curves, reward distributions, worst and best pairs, and configuration.

It needs no server, no network and no script. What comes from data or flags is escaped, images are re-encoded, and a content
security policy forbids the rest.
"""

import base64
import hashlib
import importlib.resources
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rayalign.report.charts import Colour, Series, format_number, line_chart
from rayalign.report.health import Metrics, curve, find_problems
from rayalign.report.pairs import ScoredPair, correlation, distributions, examples, length_bias, section, table, what_they_are

__all__ = ["ScoredPair", "render_report"]

BOTH_SIDES: tuple[tuple[str, str, Colour], ...] = (("chosen", "chosen", "blue"), ("rejected", "rejected", "orange"))
ONE_VALUE: tuple[tuple[str, str, Colour], ...] = (("", "", "blue"),)
# Title, metric name up to the part that differs between its curves, and those curves: (end of the name, label, colour).
CURVES = (
    ("Loss", "loss", ONE_VALUE),
    ("Accuracy", "rewards/accuracies", ONE_VALUE),
    ("Margin", "rewards/margins", ONE_VALUE),
    ("Rewards", "rewards/", BOTH_SIDES),
    ("Log-probs of the responses", "logps/", BOTH_SIDES),
    ("NLL of the chosen response", "nll_loss", ONE_VALUE),
    ("Log odds ratio", "log_odds_ratio", ONE_VALUE),
    ("Log odds of the chosen response", "log_odds_chosen", ONE_VALUE),
    ("KL estimate", "kl", ONE_VALUE),
    ("Accuracy of true against damaged images", "conditional/accuracies", ONE_VALUE),
    ("Margin of true over damaged images", "conditional/margins", ONE_VALUE),
    ("Gradient norm", "grad_norm", ONE_VALUE),
    ("Learning rate", "learning_rate", ONE_VALUE),
    ("Pairs per second", "pairs_per_second", ONE_VALUE),
    ("Fraction of time spent waiting for data", "data_wait_fraction", ONE_VALUE),
    ("Fraction of the batches that is padding", "padding_fraction", ONE_VALUE),
)


def render_report(
    *,
    title: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Metrics,
    dropped: Mapping[str, int],
    pairs: Sequence[ScoredPair],
    score_name: str = "reward",
) -> str:
    """The page as a string. `metrics` are the lines of metrics.jsonl, `dropped` the number of records by reason.

    An empty `summary` says that the run has not finished; `algorithm` and `seconds` are read from it where they are there.
    """
    css = importlib.resources.files("rayalign.report").joinpath("report.css").read_text(encoding="utf-8")
    style_hash = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; base-uri 'none'; form-action 'none'"
    body = [
        _header(title, config, summary, metrics),
        _tiles(summary, metrics, dropped, pairs, score_name=score_name),
        _warnings(metrics, pairs),
        _curves(metrics),
        distributions(pairs, score_name=score_name),
        length_bias(pairs),
        examples(pairs, score_name=score_name),
        _dropped(dropped),
        _settings(config, summary),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)} · rayalign</title>\n<style>{css}</style>\n</head>\n"
        f"<body><main>\n{chr(10).join(filter(None, body))}\n"
        "<footer>Written by rayalign. Point at a chart to read its values.</footer>\n</main></body>\n</html>\n"
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # lone surrogates in a text would make the file unwritable


def _header(title: str, config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics) -> str:
    step = max((line["step"] for line in metrics), default=0)
    facts = {
        "Algorithm": summary.get("algorithm") or config.get("rlhf_type"),
        "Model": config.get("model") or config.get("model_type"),
        "Data": config.get("dataset"),
        "Steps": f"{format_number(step)}{'' if summary else ' so far, not finished'}",
    }
    rows = [f"<div><dt>{name}</dt><dd>{escape(_words(value))}</dd></div>" for name, value in facts.items() if value]
    return f'<header><h1>{escape(title)}</h1><dl class="facts">{"".join(rows)}</dl></header>'


def _tiles(
    summary: Mapping[str, Any],
    metrics: Metrics,
    dropped: Mapping[str, int],
    pairs: Sequence[ScoredPair],
    *,
    score_name: str,
) -> str:
    tiles = []
    for name, metric in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("loss", "loss")):
        held_out, train = curve(metrics, f"eval_{metric}"), curve(metrics, metric)
        points, kind = (held_out, "Eval") if held_out else (train, "Training")
        if points:
            note = f"{format_number(points[0][1])} at step {format_number(points[0][0])}" if len(points) > 1 else ""
            tiles.append((f"{kind} {name}", format_number(points[-1][1]), note))
    scores = [pair.reward_chosen for pair in pairs if math.isfinite(pair.reward_chosen)]
    if scores and not any(pair.tokens_rejected for pair in pairs):
        tiles.append((f"Mean {score_name}", format_number(statistics.fmean(scores)), "held-out"))
    if pairs:
        tiles.append((f"Held-out {what_they_are(pairs)}", f"{len(pairs):,}", ""))
    rates = [value for _, value in curve(metrics, "pairs_per_second") if math.isfinite(value)]
    if rates:
        name = f"{what_they_are(pairs)} per second".capitalize()
        tiles.append((name, format_number(statistics.median(rates)), "median"))
    if "seconds" in summary:
        tiles.append(("Wall time", _duration(float(summary["seconds"])), ""))
    tiles.append(("Records dropped", _total(dropped), "reasons below" if dropped else ""))
    cells = [
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for name, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _warnings(metrics: Metrics, pairs: Sequence[ScoredPair]) -> str:
    if not metrics:
        return '<p class="soft">No metrics have been logged yet.</p>'
    lengths = correlation([(pair.extra_tokens, pair.margin) for pair in pairs])
    problems = find_problems(metrics, margins=[pair.margin for pair in pairs], length_correlation=lengths)
    if not problems:
        return '<p class="fine">✓ No warning signs in the metrics.</p>'
    items = "".join(f"<li>{escape(words)}</li>" for words in problems.values())
    return f'<section class="warnings" role="alert"><b>This run needs a look</b><ul>{items}</ul></section>'


def _curves(metrics: Metrics) -> str:
    charts = []
    for title, name, curves in CURVES:
        held_out = [(f"{label} eval".strip(), curve(metrics, f"eval_{name}{end}"), colour) for end, label, colour in curves]
        train = [(f"{label} train".strip(), curve(metrics, f"{name}{end}"), colour) for end, label, colour in curves]
        alone: Colour | None = "grey" if any(points for _, points, _ in held_out) and len(curves) == 1 else None
        series = [Series(label, points, alone or colour) for label, points, colour in train]
        series += [Series(label, points, colour, "marked") for label, points, colour in held_out]
        is_accuracy = name.endswith("/accuracies")
        charts.append(
            line_chart(
                title, series, x_label="step", y_range=(0.0, 1.0) if is_accuracy else None, mark=0.5 if is_accuracy else None
            )
        )
    words = "Thin lines are the logged values, thick ones held-out values or, in long runs, the mean of a stretch of the run."
    return section("Curves", words, f'<div class="charts">{"".join(charts)}</div>') if any(charts) else ""


def _dropped(dropped: Mapping[str, int]) -> str:
    if not dropped:
        return section("Dropped records", "No record was dropped.", "")
    rows = [(reason, f"{number:,}") for reason, number in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))]
    words = "Records that could not be trained on, by reason; dropped.jsonl names each."
    return section(
        "Dropped records",
        words,
        f'<div class="panel">{table(("reason", "records"), [*rows, ("total", _total(dropped))])}</div>',
    )


def _settings(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    parts = []
    for name, values in (("All flags", config), ("Summary and versions", summary)):
        if values:
            rows = [(key, _words(value)) for key, value in _flat(values)]
            parts.append(f'<details class="panel"><summary>{name}</summary>{table(("name", "value"), rows)}</details>')
    return section("Configuration", "", "".join(parts)) if parts else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of inner mappings after a dot."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _words(value: Any) -> str:
    """A flag's value as it would be written: text plain, lists with commas, the rest as in JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    return json.dumps(value, default=str, ensure_ascii=False)


def _total(dropped: Mapping[str, int]) -> str:
    return f"{sum(dropped.values()):,}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{format_number(round(seconds, 1))} s"
