"""What comes out of rounds: rounds.json, and the page rounds.html, made of the folders of the rounds."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayalign.evaluation.pool_folder import DROPPED, ROWS, read_results
from rayalign.evaluation.results import in_words
from rayalign.evaluation.statistics import estimate, mcnemar
from rayalign.report.conversations import Conversation
from rayalign.report.evaluation_page import Cell
from rayalign.report.rounds_page import DrawnRound, RoundsPage, ShownPair, render_rounds
from rayalign.storage import Store
from rayalign.training.metric_names import BY_REWARD_MODEL, BY_SUM, BY_TOKEN
from rayalign.training.metrics import read_metrics
from rayalign.training.run_report import Background, Scores, read_scores

ROUNDS, PAGE = "rounds.json", "rounds.html"

RESPONSES, SCORES, PAIRS, TRAIN = "responses", "scores", "pairs", "train"
"""The folders of a round, in the order in which they are written; `ROWS` is where data sets lie in the first three."""

ACCURACIES = (BY_SUM, BY_TOKEN, BY_REWARD_MODEL)
"""Not those of an implicit reward, whose reference is another one in each round."""

SHOWN_PAIRS = 3
"""Of each round."""


@dataclass(frozen=True)
class Round:
    """What came out of a round. `policy` is what responded, with draws from `seed`; `left_out` has numbers by reason; `model`
    was trained on the pairs, and `metrics` are those of its training."""

    number: int
    policy: str
    seed: int
    prompts: int
    responses: int
    mean_score: float
    pairs: int
    left_out: Mapping[str, int]
    model: str
    metrics: Mapping[str, float]


def write_results(folder: Store, rounds: Sequence[Round], *, flags: Mapping[str, Any]) -> None:
    """Writes rounds.json, and the page, without which rounds go on where it can't be made."""
    (folder / ROUNDS).write_json([dataclasses.asdict(found) for found in rounds])
    page = Background()
    page.run(lambda: (folder / PAGE).write_bytes(render_rounds(page_of(folder, rounds, flags=flags)).encode()))
    page.wait()


def page_of(folder: Store, rounds: Sequence[Round], *, flags: Mapping[str, Any]) -> RoundsPage:
    """What the page shows of rounds that are done. Accuracies of several rounds are of the same records, and compared, where
    --val_dataset names them."""
    places = [folder / f"round_{found.number}" for found in rounds]
    held_out = [read_scores(place / TRAIN) for place in places]
    is_same = bool(flags["val_dataset"])
    changes = ["", *(_change(now, before) if is_same else "" for before, now in itertools.pairwise(held_out))]
    metrics = read_metrics(places[0] / TRAIN / "metrics.jsonl")
    start = {name: metrics[0][f"eval_{name}"] for name in ACCURACIES if metrics and f"eval_{name}" in metrics[0]}
    return RoundsPage(
        title=folder.name,
        num_rounds=flags["num_rounds"],
        facts={
            "Algorithm": str(flags["rlhf_type"]),
            "From": rounds[0].policy,
            "Prompts": " ".join(flags["dataset"]),
            "Scored by": " ".join(flags["scorer"]),
        },
        start={name: Cell(in_words(value), value) for name, value in start.items() if is_same and metrics[0]["step"] == 0},
        rounds=[
            _drawn(found, place, scores, change)
            for found, place, scores, change in zip(rounds, places, held_out, changes, strict=True)
        ],
        is_same_data=is_same,
        flags=flags,
    )


def _drawn(found: Round, place: Store, held_out: Scores, change: str) -> DrawnRound:
    lineages = [line for table in _tables(place, ["lineage"]) for line in table["lineage"].to_pylist()]
    dropped = [json.loads(line) for name in (RESPONSES, SCORES) for line in (place / name / DROPPED).read_bytes().splitlines()]
    steps = int(found.metrics["steps"])
    return DrawnRound(
        number=found.number,
        accuracies=_accuracies(held_out),
        change=change,
        scores=[score for table in read_results(place / SCORES, ["score"]) for score in table["score"].to_pylist()],
        chosen_scores=[line["chosen_score"] for line in lineages],
        rejected_scores=[line["rejected_score"] for line in lineages],
        counts={"prompts": found.prompts, "responses": found.responses, "pairs": found.pairs, "steps": steps},
        left_out={**found.left_out, **Counter(f"dropped: {line['reason']}" for line in dropped)},
        policy=found.policy,
        seed=found.seed,
        shown=list(itertools.islice(_shown(place), SHOWN_PAIRS)),
    )


def _accuracies(scores: Scores) -> dict[str, Cell]:
    """The accuracies of held-out records that have one, with their intervals."""
    cells = {}
    for name in ACCURACIES:
        values = [own[name] for own in scores.values() if name in own]
        if values:
            found = estimate(values, seed=0)
            cells[name] = Cell(in_words(found), found.value, found.low, found.high)
    return cells


def _change(now: Scores, before: Scores) -> str:
    """In words, on how many of the same records a round is right and the one before was not, and the reverse."""
    name = next((name for name in ACCURACIES if any(name in own for own in now.values())), "")
    both = [record for record in now if name in now[record] and name in before.get(record, {})]
    if not both:
        return ""
    test = mcnemar([now[record][name] for record in both], [before[record][name] for record in both])
    return f"{test.only_first:,} records won, {test.only_second:,} lost (p = {test.p_value:.2g})"


def _tables(place: Store, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """A round's pairs, a table for each file."""
    for file in (place / PAIRS / ROWS).list():
        yield pq.read_table(pa.BufferReader(file.read_bytes()), columns=columns)


def _shown(place: Store) -> Iterator[ShownPair]:
    """The pairs of a round, in the order of the prompts."""
    for row in itertools.chain.from_iterable(table.slice(0, SHOWN_PAIRS).to_pylist() for table in _tables(place, None)):
        lineage = row["lineage"]
        turns = [("system", row["system"])] if row["system"] else []
        for said, answer in row["history"] or []:
            turns += [("user", said), ("assistant", answer)]
        yield ShownPair(
            prompt=lineage["prompt"],
            conversation=Conversation(
                turns=(*turns, ("user", row["query"])),
                chosen=row["response"],
                rejected=row["rejected_response"],
                images=tuple(image["bytes"] for image in row["images"]),
            ),
            chosen=(lineage["chosen_sample"], lineage["chosen_score"]),
            rejected=(lineage["rejected_sample"], lineage["rejected_score"]),
        )
