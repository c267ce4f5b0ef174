"""Pairs under a model: what it and its reference make of both responses, with the pair's own pictures and with wrong ones, and
what the model itself writes.

Runs in the actors of `pool`; `preferences` and `questions` make metrics of the results.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig
from rayalign.data.batch import PairBatch, assemble_changed
from rayalign.data.encoder_spec import image_processing
from rayalign.data.rows import Sources
from rayalign.data.shuffled_pictures import Pictures, shuffle_pictures, with_pictures_of
from rayalign.data.store import EncodedPair
from rayalign.evaluation.groups import Row
from rayalign.evaluation.loaded_model import LoadedModel, load_model, load_with_reference
from rayalign.evaluation.score_columns import ASKS, SCORES, SIDES, View
from rayalign.evaluation.work import Result
from rayalign.formats.records import RecordError, require
from rayalign.images.damage import damage_image
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.ops.value_head import find_value_head
from rayalign.policy.generation import Sampling, as_trained, sample_responses

MOST_SAMPLED = 128
"""Tokens of a response that is drawn for the divergence from the reference."""


@dataclass(frozen=True)
class Scoring:
    """What an actor does: the configuration that names the model, the reference (None: none), the views that are wanted, and
    whether a response to each prompt is drawn from the model for the divergence from its reference."""

    config: Config
    sources: Sources
    reference: ModelConfig | None
    views: tuple[View, ...]
    samples_kl: bool = False

    def settings(self) -> dict[str, Any]:
        """What the results depend on besides the model's files and the rows."""
        config = self.config
        return {
            "dtype": config.model.dtype,
            "attn_implementation": config.model.attn_implementation,
            "max_length": config.data.max_length,
            "max_pixels": config.data.max_pixels,
            "image_checks": list(self.views),
            "sample_kl": self.samples_kl,
        }


def make_work(scoring: Scoring) -> "PairScorer":
    """Called once in each actor: loads the model, and the reference of one that is no reward model."""
    here = require_model(scoring.config.model, REGISTERED_MODELS).here()
    if scoring.reference is None or find_value_head(Path(here.adapter or here.base)) is not None:
        return PairScorer(load_model(scoring.config, scoring.sources), scoring)
    return PairScorer(load_with_reference(scoring.config, scoring.sources, scoring.reference), scoring)


class PairScorer:
    """Scores some rows: each is {"id", "folder", "row"} of a data set, or has ASKS and SCORES besides."""

    def __init__(self, model: LoadedModel, scoring: Scoring) -> None:
        self._model = model
        self._scoring = scoring
        self._compares = scoring.reference is not None and not model.is_reward_model

    def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """One line of SCHEMA for each row, or the RecordError of one that can't be encoded."""
        results: list[Result] = [[] for _ in rows]
        pairs: dict[int, EncodedPair] = {}
        for number, row in enumerate(rows):
            try:
                pairs[number] = self._encode(row)
            except RecordError as error:
                results[number] = error
        is_reward_model = {"is_reward_model": self._model.is_reward_model}
        lines = {number: _facts(pair, rows[number]) | is_reward_model for number, pair in pairs.items()}
        scored = {number: pair for number, pair in pairs.items() if rows[number].get(SCORES, "pair")}
        with as_trained(self._model.policy):
            self._score_all(scored, lines)
            self._write_all(pairs, rows, lines)
        for number, line in lines.items():
            results[number] = [line]
        return results

    def _encode(self, row: Row) -> EncodedPair:
        if self._model.is_reward_model and not row.get(SCORES, "pair"):
            raise RecordError("reward model", "asks for a text, and a reward model scores responses and writes none")
        record = self._model.record(row)
        if row.get(SCORES, "pair"):
            require(record, "both")
        pair = self._model.encode(record, row["folder"])
        if row.get(SCORES) == "options" and not self._model.is_reward_model:
            return without_common_end(pair)
        return pair

    def _score_all(self, pairs: Mapping[int, EncodedPair], lines: Mapping[int, dict[str, Any]]) -> None:
        for numbers in self._batches(pairs):
            batch = self._model.batch([pairs[number] for number in numbers])
            self._score(batch, numbers, lines, view="")
            if self._scoring.samples_kl and self._compares:
                self._sample_kl([pairs[number] for number in numbers], [lines[number] for number in numbers])
        spec = self._model.encoder.spec
        layout, process = spec.layout, image_processing(spec)
        if "shuffled" in self._scoring.views:
            partners = shuffle_pictures(
                {number: Pictures.of(pair) for number, pair in pairs.items()}, seed=self._scoring.config.data.data_seed
            )
            for numbers in self._batches({number: pairs[number] for number in partners}):
                own, others = [pairs[n] for n in numbers], [pairs[partners[n]] for n in numbers]
                batch = with_pictures_of(own, others, layout=layout, process_images=process, max_pixels=spec.max_pixels)
                self._score(batch.to(self._model.policy.device), numbers, lines, view="shuffled_")
        if "ablated" in self._scoring.views:
            for numbers in self._batches({number: pair for number, pair in pairs.items() if pair.images}):
                some = [pairs[number] for number in numbers]

                def damage(image: Image.Image, pair: int, number: int, some: Sequence[EncodedPair] = some) -> Image.Image:
                    return damage_image(image, seed=f"{some[pair].id}/{number}")

                batch = assemble_changed(some, damage, layout=layout, process_images=process)
                self._score(batch.to(self._model.policy.device), numbers, lines, view="ablated_")

    def _batches(self, pairs: Mapping[int, EncodedPair]) -> list[list[int]]:
        """The rows' numbers in micro-batches of rows of about the same length."""
        order = sorted(pairs, key=lambda number: pairs[number].num_tokens)
        size = self._scoring.config.optimizer.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _score(self, batch: PairBatch, numbers: Sequence[int], lines: Mapping[int, dict[str, Any]], *, view: str) -> None:
        if self._model.is_reward_model:
            found = {"": self._model.values(batch)}
        else:
            logps = self._model.logps(batch)
            found = {"": (logps.chosen.total, logps.rejected.total)}
            if self._compares:
                reference = self._model.reference_logps(batch)
                found["reference_"] = (reference.chosen.total, reference.rejected.total)
        for whose, sides in found.items():
            for side, values in zip(SIDES, torch.stack(sides).double().tolist(), strict=True):
                for number, value in zip(numbers, values, strict=True):
                    lines[number][f"{whose}{view}{side}"] = value

    def _sample_kl(self, pairs: Sequence[EncodedPair], lines: Sequence[dict[str, Any]]) -> None:
        """log p - log p of the reference, summed over a response that the model itself gives: in the mean over many, the KL
        divergence of the two (over at most MOST_SAMPLED tokens)."""
        spec = self._model.encoder.spec
        sampling = Sampling(temperature=1.0, max_new_tokens=MOST_SAMPLED, seed=self._scoring.config.data.data_seed)
        drawn = [responses[0] for responses in sample_responses(self._model.policy, spec, pairs, sampling)]
        ends = [[spec.tokenizer.eos_token_id] if one.is_ended else [] for one in drawn]
        own = [
            dataclasses.replace(pair, chosen_ids=[*one.ids, *end], rejected_ids=[])
            for pair, one, end in zip(pairs, drawn, ends, strict=True)
        ]
        batch = self._model.batch(own)
        divergences = self._model.logps(batch).chosen.total - self._model.reference_logps(batch).chosen.total
        for line, value in zip(lines, divergences.double().tolist(), strict=True):
            line["kl"] = value

    def _write_all(self, pairs: Mapping[int, EncodedPair], rows: Sequence[Row], lines: Mapping[int, dict[str, Any]]) -> None:
        if self._model.is_reward_model:
            return
        for limit in sorted({rows[number].get(ASKS, 0) for number in pairs} - {0}):
            asked = {number: pair for number, pair in pairs.items() if rows[number].get(ASKS, 0) == limit}
            spec, greedy = self._model.encoder.spec, Sampling(max_new_tokens=limit)
            for numbers in self._batches(asked):
                responses = sample_responses(self._model.policy, spec, [asked[number] for number in numbers], greedy)
                for number, (response,) in zip(numbers, responses, strict=True):
                    lines[number]["text"] = spec.tokenizer.decode(response.ids, skip_special_tokens=True).strip()


def without_common_end(pair: EncodedPair) -> EncodedPair:
    """The pair without the tokens that both responses end with, of which each keeps one: what closes a response says nothing
    of which option it is."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    most = min(len(chosen), len(rejected)) - 1
    common = next((k for k in range(most) if chosen[-1 - k] != rejected[-1 - k]), most)
    if common <= 0:
        return pair
    return dataclasses.replace(pair, chosen_ids=chosen[:-common], rejected_ids=rejected[:-common])


def _facts(pair: EncodedPair, row: Row) -> dict[str, Any]:
    counts = {"chosen_tokens": len(pair.chosen_ids), "rejected_tokens": len(pair.rejected_ids)}
    return {**(counts if row.get(SCORES, "pair") else {}), "num_images": len(pair.images)}
