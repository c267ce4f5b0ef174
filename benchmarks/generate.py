"""Responses and their scores, as the workers of `generate` and `score` make them, against plain transformers.

    python benchmarks/generate.py                    # a quarter of an hour on two cores
    python benchmarks/generate.py --case tiny        # a smoke test

Prompts with a photo each; N responses to each of them are drawn, and then scored by their likelihood and by a reward model. One
process and one thread on either side, models loaded before, everything between the rows of a file and the texts or numbers
included: reading, pictures, tokens, forwards. No cluster.

transformers is used as its documentation has it: prompts sorted by length and padded on the left, `generate` with
num_return_sequences, which reads each prompt N times; rows padded on the right, and the logits of the responses alone
(logits_to_keep). Both sides run as many prompts or rows at a time. Before anything is timed greedy texts must be the same, and
scores but for rounding. Responses end at their limit here, so that both sides draw as many tokens.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import in_turn, machine_facts, parser_of, ratios, seconds_of, set_up, show, spread, table, write_json
from PIL import Image
from safetensors.torch import save_file
from synthetic import MEDIUM, SHORT, TINY, Shape, save_model, write_records
from transformers import AutoModelForImageTextToText, AutoProcessor

from rayalign.config.inference import InferenceConfig
from rayalign.config.sections import ModelConfig
from rayalign.data.rows import Sources
from rayalign.evaluation.generate import respond
from rayalign.evaluation.loaded_model import LoadedModel, load_model
from rayalign.evaluation.score import candidates_of
from rayalign.evaluation.scorers.by_model import Kind, model_scorer
from rayalign.evaluation.scorers.scorer import Score
from rayalign.evaluation.start import config_of
from rayalign.policy.generation import Sampling

BATCH_SIZE = 8
SCORE_TOLERANCE = 2e-4
"""Of a summed log-probability of some hundred, or a reward near 1: float32, sums in another order."""


@dataclass(frozen=True)
class Case:
    """A model, how many prompts it responds to, how often to each, and how long."""

    shape: Shape
    prompts: int
    n: int
    new_tokens: int


CASES = {
    "tiny": Case(TINY, prompts=4, n=2, new_tokens=6),
    "short": Case(SHORT, prompts=8, n=4, new_tokens=64),
    "medium": Case(MEDIUM, prompts=8, n=4, new_tokens=64),
}
KINDS: tuple[Kind, ...] = ("likelihood", "reward_model")

Row = Mapping[str, Any]
"""A line of the records' file: images, prompt, chosen, rejected."""


class Transformers:
    """Plain transformers, as a careful user writes it; `head` [1, H] is a reward model's."""

    def __init__(self, model: Path, folder: Path, head: torch.Tensor) -> None:
        self._folder, self._head = folder, head
        self._model: Any = AutoModelForImageTextToText.from_pretrained(model).eval()
        self._processor: Any = AutoProcessor.from_pretrained(model)

    def respond(self, rows: Sequence[Row], case: Case, *, temperature: float) -> list[list[str]]:
        """The texts of `case.n` responses to each prompt, of one where the likeliest tokens are taken."""
        prompts = [self._prompt(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
        draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": case.n}
        kind = draws if temperature else {"do_sample": False}
        texts: dict[int, list[str]] = {}
        for some in _in_batches(order):
            inputs = self._inputs([prompts[i] for i in some], [rows[i] for i in some], side="left")
            with torch.inference_mode():
                ids = self._model.generate(**inputs, max_new_tokens=case.new_tokens, **kind)
            found = self._processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            count = len(found) // len(some)
            texts |= {i: found[place * count : (place + 1) * count] for place, i in enumerate(some)}
        return [[text.strip() for text in texts[i]] for i in range(len(rows))]

    def score(self, rows: Sequence[Row], kind: Kind) -> list[float]:
        """A number for the chosen response of each row and one for the rejected one."""
        both = [(row, side) for row in rows for side in ("chosen", "rejected")]
        tokenizer = self._processor.tokenizer
        endings = [tokenizer(row[side][0]["content"] + tokenizer.eos_token).input_ids for row, side in both]
        scores: dict[int, float] = {}
        for some in _in_batches(sorted(range(len(both)), key=lambda i: len(endings[i]))):
            inputs = self._inputs([self._prompt(both[i][0]) for i in some], [both[i][0] for i in some], side="right")
            masks = inputs["attention_mask"].bool()
            ids = [[*own[mask].tolist(), *endings[i]] for own, mask, i in zip(inputs["input_ids"], masks, some, strict=True)]
            inputs = dict(inputs) | dict(tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt"))
            ends, behind = torch.tensor([len(own) for own in ids]), [len(endings[i]) for i in some]
            with torch.inference_mode():
                found = self._rewards(inputs, ends) if kind == "reward_model" else self._likelihoods(inputs, ends, behind)
            scores |= dict(zip(some, found.tolist(), strict=True))
        return [scores[i] for i in range(len(both))]

    def _rewards(self, inputs: Any, ends: torch.Tensor) -> torch.Tensor:
        states = self._model.model(**inputs).last_hidden_state
        last: torch.Tensor = states[torch.arange(len(ends)), ends - 1]
        return (last @ self._head.T).squeeze(1)

    def _likelihoods(self, inputs: Any, ends: torch.Tensor, behind: Sequence[int]) -> torch.Tensor:
        length = inputs["input_ids"].shape[1]
        kept = max(length - int(end) + tokens for end, tokens in zip(ends, behind, strict=True)) + 1
        logits = self._model(**inputs, logits_to_keep=kept).logits
        targets = inputs["input_ids"][:, length - kept + 1 :]
        logps = logits[:, :-1].log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
        place = torch.arange(length - kept + 1, length)
        counts = torch.tensor(behind)
        is_response = (place < ends[:, None]) & (place >= (ends - counts)[:, None])
        return (logps * is_response).sum(1)

    def _prompt(self, row: Row) -> str:
        (question,) = row["prompt"]
        parts = [{"type": "image"}, {"type": "text", "text": question["content"]}]
        return str(self._processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True))

    def _inputs(self, texts: Sequence[str], rows: Sequence[Row], *, side: str) -> Any:
        images = [Image.open(self._folder / row["images"][0]).convert("RGB") for row in rows]
        options = {"padding": True, "padding_side": side, "add_special_tokens": False, "return_tensors": "pt"}
        return self._processor(text=list(texts), images=images, **options)


class Rayalign:
    """What the actors of the verbs do with a group of rows."""

    def __init__(self, model: Path, reward_model: Path, folder: Path) -> None:
        self._folder = folder
        self._config = config_of(InferenceConfig(model=str(model), output_dir=str(folder / "out"), batch_size=BATCH_SIZE))
        self._sources = Sources((), None, allow_image_urls=False)
        self._model: LoadedModel = load_model(self._config, self._sources, responses="chosen")
        models: dict[Kind, Path] = {"likelihood": model, "reward_model": reward_model}
        self._scorers = {
            kind: model_scorer(kind, ModelConfig(model=str(place)), beta=None, reference=None).load(self._config, self._sources)
            for kind, place in models.items()
        }

    def respond(self, rows: Sequence[Row], case: Case, *, temperature: float) -> list[list[str]]:
        sampling = Sampling(case.n if temperature else 1, temperature, max_new_tokens=case.new_tokens)
        results = respond(self._model, sampling, BATCH_SIZE, self._in_file(rows))
        return [[str(line["response"]) for line in result] for result in results]  # type: ignore[union-attr]

    def score(self, rows: Sequence[Row], kind: Kind) -> list[float]:
        candidates = [candidate for row in self._in_file(rows) for candidate in candidates_of(row, self._sources)]
        scores = self._scorers[kind](candidates)
        assert all(isinstance(score, Score) for score in scores), scores[:1]
        return [score.value for score in scores]  # type: ignore[union-attr]

    def _in_file(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [{"id": f"pairs.jsonl:{n}", "folder": str(self._folder), "row": row} for n, row in enumerate(rows)]


def _in_batches(order: Sequence[int]) -> list[Sequence[int]]:
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def run_case(name: str, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Raises SystemExit where the two sides do not compute the same."""
    case = CASES[name]
    model = save_model(folder / "model", case.shape)
    head = torch.randn(1, case.shape.hidden, generator=torch.Generator().manual_seed(0))
    reward_model = folder / "rm"
    reward_model.mkdir()
    for file in model.iterdir():
        (reward_model / file.name).symlink_to(file)
    save_file({"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}, reward_model / "value_head.safetensors")
    records = write_records(folder / "data", pairs=case.prompts, words=(60, 120) if name != "tiny" else (4, 9))
    rows: list[Row] = [json.loads(line) for line in records.read_text().splitlines()]
    sides = {
        "transformers": Transformers(model, records.parent, head),
        "rayalign": Rayalign(model, reward_model, records.parent),
    }

    greedy = [side.respond(rows[:2], case, temperature=0.0) for side in sides.values()]
    if greedy[0] != greedy[1]:
        raise SystemExit(f"The two sides do not write the same: {greedy}")
    differences = {}
    for kind in KINDS:
        theirs, ours = (torch.tensor(side.score(rows[:4], kind)) for side in sides.values())
        differences[kind] = float((theirs - ours).abs().max() / theirs.abs().max())
        if not differences[kind] <= SCORE_TOLERANCE:
            raise SystemExit(f"The two sides do not score alike ({kind}): {theirs.tolist()} {ours.tolist()}")
    works: dict[str, tuple[int, Callable[[Any], Any]]] = {
        "generate": (case.prompts * case.n, lambda side: side.respond(rows, case, temperature=1.0)),
        **{f"score by {kind}": (2 * case.prompts, functools.partial(_score, rows, kind)) for kind in KINDS},
    }
    lines = []
    for work, (count, do) in works.items():
        turns = {side: functools.partial(seconds_of, functools.partial(do, made)) for side, made in sides.items()}
        seconds = in_turn(turns, rounds=rounds)
        lines.append(
            {
                "work": work,
                "rows_per_second": {side: spread([count / taken.wall for taken in own]) for side, own in seconds.items()},
                "times_as_fast": ratios(*([taken.wall for taken in seconds[side]] for side in sides)),
                "times_as_fast_in_cpu_seconds": ratios(*([taken.cpu for taken in seconds[side]] for side in sides)),
            }
        )
    facts = {"case": name, "prompts": case.prompts, "n": case.n, "new_tokens": case.new_tokens, "batch_size": BATCH_SIZE}
    return {**facts, "score_differences_of_largest": differences, "works": lines}


def _score(rows: Sequence[Row], kind: Kind, side: Any) -> list[float]:
    scores: list[float] = side.score(rows, kind)
    return scores


def main() -> None:
    parser = parser_of(__doc__, output="generate.json", rounds=2, threads=1)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["short", "medium"])
    arguments: argparse.Namespace = parser.parse_args()
    set_up(arguments.threads)
    facts = machine_facts(threads=arguments.threads)
    cases = []
    for name in arguments.case:
        with tempfile.TemporaryDirectory() as temporary:
            cases.append(run_case(name, Path(temporary), rounds=arguments.rounds))
        write_json(arguments.output, {"machine": facts, "cases": cases})
    lines = [(case, line) for case in cases for line in case["works"]]
    columns = {
        "case": lambda line: line[0]["case"],
        "work": lambda line: line[1]["work"],
        "transformers, rows/s": lambda line: show(line[1]["rows_per_second"]["transformers"]),
        "ours, rows/s": lambda line: show(line[1]["rows_per_second"]["rayalign"]),
        "times as fast": lambda line: show(line[1]["times_as_fast"]),
        "in processor time": lambda line: show(line[1]["times_as_fast_in_cpu_seconds"]),
    }
    print(table(columns, lines))


if __name__ == "__main__":
    main()
