"""MMHal-Bench: free answers, which a judge rates from 0 to 6 by how informative they are and whether they are true (Sun et al.
2023, https://arxiv.org/abs/2309.14525). The judge's prompt is the benchmark's own."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
    SEED,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    find_file,
    one_of,
    read_items,
    word_of,
)
from rayalign.evaluation.statistics import estimate
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = "response_template.json, eval_gpt4.py (whose prompt the judge gets) and images/ of Shengcao1006/MMHal-Bench"
PROMPT = "template"
"""The name that the prompt has in eval_gpt4.py, which is read and not run."""

HALLUCINATES_BELOW = 3


def read(place: Store) -> Contents:
    """The questions, and the judge's prompt. Raises ValueError."""
    items, left_out = read_items([find_file(place, ("response_template.json",), needs=FILES)], _parse)
    prompt = _prompt_in(find_file(place, ("eval_gpt4.py",), needs=FILES))
    return Contents(items, left_out, place, ("images", ""), prompt)


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    contents = one_of(row, "image_content")
    if not isinstance(contents, list):
        raise RecordError("wrong type", "expected a list of names", field="image_content")
    image, kind = word_of(row, "image_src").rpartition("/")[2], word_of(row, "question_type")
    yield Item(
        id=f"{word_of(row, 'image_id')}/{kind}",
        query=word_of(row, "question"),
        images=(image,),
        facts={"type": kind, "contents": ", ".join(map(str, contents)), "answer": word_of(row, "gt_answer")},
    )


def _prompt_in(file: Store) -> str:
    try:
        statements = ast.parse(file.read_bytes().decode()).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.location}: is no Python file ({error}). Take the benchmark's own.") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            text = statement.value.value
            if PROMPT in names and isinstance(text, str) and text.count("{}") == 4:
                return text
    raise ValueError(f"{file.location}: holds no {PROMPT} = '...' with four {{}}. Take the benchmark's own file.")


def judge_prompt(said: Said, prompt: str) -> str:
    """What the judge is asked about an answer."""
    facts = said.item.facts
    return prompt.format(facts["contents"], said.item.query, facts["answer"], said.text)


def rating_in(judgement: str) -> int | None:
    """The rating that a judgement gives; None where it gives none, or several."""
    ratings = {int(rating) for rating in re.findall(r"rating:\s*\**\s*([0-6])(?![0-9])", judgement.lower())}
    return ratings.pop() if len(ratings) == 1 else None


def metrics(judgements: Sequence[Said], prompt: str) -> Metrics:
    """The mean rating, also by type of question, and the share of those below 3, which hallucinate. As the benchmark has it, a
    judgement without a clear rating counts as 0, and so does none; `unrated` is the number of these."""
    ratings = [rating_in(one.text or "") for one in judgements]
    scores = [float(rating or 0) for rating in ratings]
    found: Metrics = {
        "score": estimate(scores, seed=SEED),
        "hallucination_rate": estimate([score < HALLUCINATES_BELOW for score in scores], seed=SEED),
        "unrated": float(ratings.count(None)),
    }
    for kind in dict.fromkeys(one.item.facts["type"] for one in judgements):
        inside = [score for score, one in zip(scores, judgements, strict=True) if one.item.facts["type"] == kind]
        found[f"score/{kind}"] = estimate(inside, seed=SEED)
    return found


MMHAL_BENCH = Benchmark(
    "MMHal-Bench",
    "https://arxiv.org/abs/2309.14525",
    FILES,
    read,
    of_texts=metrics,
    judge_prompt=judge_prompt,
    max_new_tokens=512,
)
