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
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rayalign.report.charts import format_number
from rayalign.report.conversations import Answers, Conversation, answers_section
from rayalign.report.curves import curves_section
from rayalign.report.health import Metrics, curve, find_problems, what_cannot_be_told
from rayalign.report.markup import section, table
from rayalign.report.pairs import ScoredPair, distributions, examples, length_bias, what_they_are

STAGES = {
    "ray_start": "starting Ray",
    "encoding": "reading and encoding records",
    "reference": "log-probs of the reference",
    "model_loading": "loading the model",
    "training": "training",
    "evaluation": "evaluation",
    "checkpoints": "standing still for checkpoints",
    "saving": "writing the model",
    "other": "starting workers, and the rest",
}
"""The stages of a run, in order, and what they are called."""

TILES = (
    ("Accuracy by likelihood", "accuracy/likelihood"),
    ("Accuracy of {reward}", "rewards/accuracies"),
    ("Margin", "rewards/margins"),
    ("Loss", "loss"),
    ("Picture reliance", "image_reliance"),
)
"""Names of tiles and their metrics."""


@dataclass(frozen=True)
class Times:
    """Seconds of the whole command so far, and of each of its STAGES; of all its starts together."""

    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    starts: int = 1


def render_report(
    *,
    title: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Metrics,
    dropped: Mapping[str, int],
    pairs: Sequence[ScoredPair],
    conversations: Mapping[str, Conversation],
    answers: Answers,
    times: Times,
    num_steps: int,
    score_name: str = "reward",
) -> str:
    """The page as a string. `metrics` are the lines of metrics.jsonl, `dropped` the number of records by reason;
    `conversations` has at least those of `pairs.extremes`, by id; `num_steps` is the whole run's.

    An empty `summary` says that the run has not finished; `algorithm` is read from it where it is there.
    """
    model_step = summary.get("model_step", math.inf)
    body = [
        _header(title, config, summary, metrics, num_steps),
        _tiles(config, [line for line in metrics if line["step"] <= model_step], dropped, pairs, times, score_name=score_name),
        _warnings(metrics, pairs, is_finished=bool(summary), model_step=model_step),
        curves_section(metrics, reward_name=reward_name(config), benchmarks=benchmarks_of(config)),
        answers_section(answers, conversations),
        distributions(pairs, score_name=score_name),
        length_bias(pairs),
        examples(pairs, conversations, score_name=score_name),
        _times(times),
        _dropped(dropped),
        _settings(config, summary),
    ]
    return html_page(title, body)


def html_page(title: str, body: Sequence[str]) -> str:
    """The sections of a page, those that are empty left out, as a whole HTML file."""
    css = importlib.resources.files("rayalign.report").joinpath("report.css").read_text(encoding="utf-8")
    style_hash = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; base-uri 'none'; form-action 'none'"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)} · rayalign</title>\n<style>{css}</style>\n</head>\n"
        f"<body><main>\n{chr(10).join(filter(None, body))}\n"
        "<footer>Written by rayalign. Point at a chart to read its values.</footer>\n</main></body>\n</html>\n"
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # lone surrogates in a text would make the file unwritable


def _header(title: str, config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics, num_steps: int) -> str:
    step = max((line["step"] for line in metrics), default=0)
    facts = {
        "Algorithm": summary.get("algorithm") or config.get("rlhf_type"),
        "Model": config.get("model") or config.get("model_type"),
        "Data": config.get("dataset"),
        "Steps": format_number(num_steps) if summary else None,
    }
    rows = [f"<div><dt>{name}</dt><dd>{escape(_words(value))}</dd></div>" for name, value in facts.items() if value]
    state = ""
    if not summary:
        state = (
            f'<p class="state"><b>Not finished, step {format_number(step)} of {format_number(num_steps)}.</b> This page is '
            "written anew at every evaluation; load it again to see a newer one.</p>"
        )
    told = []
    if stopped := summary.get("stopped_early"):
        told.append(f"{stopped[:1].upper()}{stopped[1:]}.")
    if summary.get("model_step", num_steps) < num_steps:
        told.append(
            f"The model is that of step {format_number(summary['model_step'])}, the best one; tiles and warnings are of it."
        )
    if told:
        state = f'<p class="state">{escape(" ".join(told))}</p>'
    return f'<header><h1>{escape(title)}</h1><dl class="facts">{"".join(rows)}</dl>{state}</header>'


def _tiles(
    config: Mapping[str, Any],
    metrics: Metrics,
    dropped: Mapping[str, int],
    pairs: Sequence[ScoredPair],
    times: Times,
    *,
    score_name: str,
) -> str:
    names = [(name.format(reward=reward_name(config)), metric) for name, metric in TILES]
    tiles = [tile for name, metric in names if (tile := _course(name, metric, metrics, pairs))]
    scores = [pair.reward_chosen for pair in pairs if math.isfinite(pair.reward_chosen)]
    if scores and not any(pair.tokens_rejected for pair in pairs):
        tiles.append((f"Mean {score_name}", "", format_number(statistics.fmean(scores)), "held-out"))
    if pairs:
        tiles.append((f"Held-out {what_they_are(pairs)}", "", f"{len(pairs):,}", ""))
    rates = [value for _, value in curve(metrics, "pairs_per_second") if math.isfinite(value)]
    if rates:
        name = f"{what_they_are(pairs)} per second".capitalize()
        tiles.append((name, "", format_number(statistics.median(rates)), "median"))
    if times.seconds:
        tiles.append(("Wall time", "", _duration(times.seconds), "of the whole command"))
    tiles.append(("Records dropped", "", _total(dropped), "reasons below" if dropped else ""))
    cells = [
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">'
        f"{f'<small>{escape(start)} →</small> ' if start else ''}<span>{escape(value)}</span></div>"
        f'<div class="note">{escape(note)}</div></div>'
        for name, start, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _course(name: str, metric: str, metrics: Metrics, pairs: Sequence[ScoredPair]) -> tuple[str, str, str, str] | None:
    """A tile (name, value at the start, value now, note) of a metric: the held-out one, else the training's. Of a held-out
    accuracy the note says of how many pairs."""
    held_out = curve(metrics, f"eval_{metric}")
    num_pairs = sum(pair.has_both for pair in pairs)
    of = f"{num_pairs:,} held-out pairs" if num_pairs and "accura" in metric else "held-out"
    points, kind = (held_out, of) if held_out else (curve(metrics, metric), "training")
    if not points:
        return None
    (first, start), (last, now) = points[0], points[-1]
    errors = curve(metrics, f"eval_{metric}/stderr")
    if errors:
        kind = f"± {format_number(round(errors[-1][1], 3))} standard error"
    if first == last:
        return name, "", format_number(now), f"{kind}, {f'step {format_number(last)}' if last else 'at the start'}"
    begin = f"steps {format_number(first)}" if first else "start"
    return name, format_number(start), format_number(now), f"{kind}, {begin} → {format_number(last)}"


def reward_name(config: Mapping[str, Any]) -> str:
    """What gives the rewards of a run: a reward model's head, or the log-probs in which they are implicit."""
    return "the reward model" if config.get("rlhf_type") == "rm" else "the implicit reward"


def benchmarks_of(config: Mapping[str, Any]) -> list[str]:
    """The names of the benchmarks that a run's checkpoints are evaluated on, as metrics have them."""
    return [str(argument).partition(":")[0].replace("-", "_").lower() for argument in config.get("eval_benchmarks") or ()]


def _warnings(metrics: Metrics, pairs: Sequence[ScoredPair], *, is_finished: bool, model_step: float) -> str:
    if not metrics:
        return '<p class="soft">No metrics have been logged yet.</p>'
    problems = find_problems(metrics, pairs=pairs, is_finished=is_finished, model_step=model_step)
    gap = what_cannot_be_told(pairs)
    note = f'<p class="soft">{escape(gap)}</p>' if gap else ""
    if not problems and gap:
        return f'<p class="soft">No warning signs in the metrics{"" if is_finished else " so far"}. {escape(gap)}</p>'
    if not problems:
        return f'<p class="fine">✓ No warning signs in the metrics{"" if is_finished else " so far"}.</p>'
    items = "".join(f"<li>{escape(words)}</li>" for words in problems.values())
    return f'<section class="warnings" role="alert"><b>This run needs a look</b><ul>{items}</ul>{note}</section>'


def _times(times: Times) -> str:
    stages = {name: seconds for name, seconds in times.stages.items() if seconds}
    if not stages:
        return ""
    rows = [
        f'<tr><td>{escape(STAGES.get(name, name))}</td><td class="number">{escape(_duration(seconds))}</td><td class="bars">'
        f'<svg viewBox="0 0 200 10" preserveAspectRatio="none" aria-hidden="true"><rect class="blue" x="0" y="0" '
        f'width="{200 * seconds / max(stages.values()):.1f}" height="10"/></svg></td></tr>'
        for name, seconds in stages.items()
    ]
    words = "Of the whole command, from its start."
    if times.starts > 1:
        words = (
            f"Added up over {times.starts:,} starts of the command; of a start that was cut short, what came after its last "
            "evaluation isn\u2019t counted."
        )
    return section("Where the time went", words, f'<div class="panel times"><table>{"".join(rows)}</table></div>')


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
