"""Preference pairs from scored responses: which responses to a prompt are set against each other, and the rows that say so."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayalign.evaluation.pool_folder import read_results
from rayalign.evaluation.prompts import PROMPT_FIELDS
from rayalign.storage import Store

Line = Mapping[str, Any]
"""A line of `score.score_schema`."""

LINEAGE = pa.struct(
    [
        ("round", pa.int32()),
        ("model", pa.string()),
        ("scorer", pa.string()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("chosen_sample", pa.int32()),
        ("rejected_sample", pa.int32()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
    ]
)
"""Where a pair comes from: the round, the model that responded, what scored, the seed of the draws, the prompt's id, and of
both responses their numbers among those to the prompt and their scores."""

PAIR_SCHEMA = pa.schema(
    [
        *(field for field in PROMPT_FIELDS if field.name != "extra"),
        ("response", pa.string()),
        ("rejected_response", pa.string()),
        ("lineage", LINEAGE),
    ]
)

FILE_PAIRS = 1000


CUT, EMPTY, SAME = "responses that did not end", "empty responses", "responses with the text of another one"
CLOSE, ALIKE = "pairs whose scores are too close", "pairs that are too alike"
"""Why responses, and pairs of them, are left out."""


@dataclass(frozen=True)
class Choice:
    """(better, worse) of the responses to one prompt, and how many responses and pairs were left out, by reason."""

    pairs: Sequence[tuple[Line, Line]]
    left_out: Counter[str]


def choose_pairs(responses: Sequence[Line], *, per_prompt: int, margin: float, max_similarity: float) -> Choice:
    """Pairs the responses to one prompt: the best with the worst, the second best with the second worst, and so on up to
    `per_prompt`; 0: all pairs. Of equal texts the first counts; left out are responses that did not end, pairs whose scores
    differ by no more than the margin, and those that are at least so similar."""
    left_out: Counter[str] = Counter()
    distinct: dict[str, Line] = {}
    for response in responses:
        text = _normal(response["response"])
        reason = CUT if not response["is_ended"] else EMPTY if not text else SAME if text in distinct else None
        if reason is None:
            distinct[text] = response
        else:
            left_out[reason] += 1
    ordered = sorted(distinct.values(), key=lambda line: (-line["score"], line["sample"]))
    if per_prompt:
        places: Iterable[tuple[int, int]] = ((i, len(ordered) - 1 - i) for i in range(len(ordered) // 2))
    else:
        places = itertools.combinations(range(len(ordered)), 2)
    pairs: list[tuple[Line, Line]] = []
    for better, worse in ((ordered[i], ordered[j]) for i, j in places):
        if per_prompt and len(pairs) == per_prompt:
            break
        if better["score"] - worse["score"] <= margin:
            left_out[CLOSE] += 1
        elif _similarity(better["response"], worse["response"], at_least=max_similarity) >= max_similarity:
            left_out[ALIKE] += 1
        else:
            pairs.append((better, worse))
    return Choice(pairs, left_out)


def by_prompt(scores: Store) -> Iterator[list[Line]]:
    """The scored responses of each prompt in a pool's folder, in the order of the prompts' ids, then of the samples, however
    often the pool was resumed: a row that was dropped at first stands in a later file. Held in memory are the ids, and lines
    that stand before those of an earlier prompt, which are few: files are in about the order of the prompts."""
    left = Counter(key for table in read_results(scores, ["prompt_id"]) for key in table["prompt_id"].to_pylist())
    ordered = iter(sorted(left, key=_in_order))
    key = next(ordered, None)
    waiting: dict[str, list[Line]] = {}
    for table in read_results(scores):
        for line in table.to_pylist():
            waiting.setdefault(line["prompt_id"], []).append(line)
        while key is not None and len(waiting.get(key, ())) == left[key]:
            yield sorted(waiting.pop(key), key=lambda line: line["sample"])
            key = next(ordered, None)


def _in_order(key: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts ids with their numbers as numbers: row 10 of a file comes behind row 9."""
    parts = re.split("([0-9]+)", key)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), key


def pair_row(better: Line, worse: Line, images: Sequence[Mapping[str, Any]], lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A row of PAIR_SCHEMA, in the native record format, with these images."""
    return {
        **{name: better[name] for name in ("system", "query", "history")},
        "images": list(images),
        "response": better["response"],
        "rejected_response": worse["response"],
        "lineage": {
            **lineage,
            "prompt": better["prompt_id"],
            "chosen_sample": better["sample"],
            "rejected_sample": worse["sample"],
            "chosen_score": better["score"],
            "rejected_score": worse["score"],
        },
    }


def write_pairs(rows: Iterable[Mapping[str, Any]], folder: Store) -> int:
    """Writes rows of PAIR_SCHEMA into files of a folder, in place of what it held; returns their number."""
    folder.delete()
    count = 0
    waiting = iter(rows)
    while some := list(itertools.islice(waiting, FILE_PAIRS)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(some, schema=PAIR_SCHEMA), sink)
        (folder / f"{count:09}.parquet").write_bytes(sink.getvalue().to_pybytes())
        count += len(some)
    return count


def _normal(text: str) -> str:
    """The text without what near-duplicates differ in: case, spaces and punctuation."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip() or text.strip()


def _similarity(one: str, other: str, *, at_least: float) -> float:
    """How alike two texts are, 0 to 1 (Ratcliff and Obershelp); an upper bound of it where that is below `at_least`."""
    if at_least == 1:
        return 0.0  # equal ones are left out already
    matcher = difflib.SequenceMatcher(None, _normal(one), _normal(other), autojunk=False)
    for bound in (matcher.real_quick_ratio, matcher.quick_ratio):
        if (found := bound()) < at_least:
            return found
    return matcher.ratio()
