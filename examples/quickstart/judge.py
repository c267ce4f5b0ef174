"""Asks and scores the quickstart's models with plain transformers and peft, apart from the library that trained them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from small_vlm import prompt_ids, response_ids, token_logps
from task import QUESTION, SLOTS, Digits, Pairs, Pictures, answer, read_answer

BATCH = 256


class Scores(NamedTuple):
    """One line of the table, on held-out pictures: share of the pairs whose chosen answer is the more probable; mean of
    log p(chosen) - log p(rejected); shares of the digits and of the whole answers that greedy decoding gets right."""

    preference: float
    margin: float
    digits: float
    answers: float


def load(folder: Path, adapter: Path | None = None) -> Any:
    """The model of a folder, with an adapter merged in where one is named."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def read_pixels(processor: Any, folder: Path, pictures: Pictures) -> Tensor:
    opened = [Image.open(folder / file) for file in pictures.files]
    pixels: Tensor = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    return pixels


@torch.no_grad()
def ask(model: Any, processor: Any, pixels: Tensor, *, temperature: float = 0.0, seed: int = 0) -> list[list[int] | None]:
    """The digits of one answer per picture, greedy or sampled; None where the answer is of another form."""
    torch.manual_seed(seed)
    prompt, texts = prompt_ids(processor, QUESTION), []
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    length = response_ids(processor, [answer([0] * SLOTS)]).shape[1]
    for part in pixels.split(BATCH):
        ids = prompt.expand(len(part), -1)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=part,
            max_new_tokens=length,
            pad_token_id=processor.tokenizer.pad_token_id,
            **how,
        )
        texts += processor.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [read_answer(text) for text in texts]


def sample_pairs(
    model: Any, processor: Any, pixels: Tensor, digits: Digits, *, temperature: float, seed: int, wrong_votes: float = 0.0
) -> Pairs:
    """Preference pairs of the model's own answers: two are sampled for each picture, and the one with more digits right is
    chosen.

    Ties and answers of another form are left out. A careless judge swaps a fraction `wrong_votes` of the pairs.
    """
    first, second = (ask(model, processor, pixels, temperature=temperature, seed=2 * seed + k) for k in (0, 1))
    draw, found = np.random.default_rng(seed), []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if one is None or other is None:
            continue
        lead = int((one == digits[number]).sum()) - int((other == digits[number]).sum())
        if lead == 0:
            continue
        better, worse = (one, other) if lead > 0 else (other, one)
        found.append((number, worse, better) if draw.random() < wrong_votes else (number, better, worse))
    picture, chosen, rejected = zip(*found, strict=True)
    return Pairs(np.array(picture), np.array(chosen), np.array(rejected))


def preference(model: Any, processor: Any, pixels: Tensor, pairs: Pairs) -> tuple[float, float]:
    """Share of the pairs whose chosen answer is the more probable, and the mean difference of log-probabilities."""
    return _lead(lambda *answers: token_logps(model, *answers).sum(1), processor, pixels, pairs)


def ranking(model: Any, head: Path, processor: Any, pixels: Tensor, pairs: Pairs) -> tuple[float, float]:
    """Share of the pairs whose chosen answer a reward model scores higher, by its value head on the last hidden state of the
    answer's end, and the mean difference of scores."""
    weights = load_file(head)
    weight, bias = weights["v_head.summary.weight"][0], weights["v_head.summary.bias"]

    def value(prompt: Tensor, pixels: Tensor, responses: Tensor) -> Tensor:
        ids = torch.cat([prompt.expand(len(responses), -1), responses], 1)
        states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).last_hidden_state
        return states[:, -1] @ weight + bias

    return _lead(value, processor, pixels, pairs)


@torch.no_grad()
def _lead(
    rate: Callable[[Tensor, Tensor, Tensor], Tensor], processor: Any, pixels: Tensor, pairs: Pairs
) -> tuple[float, float]:
    """`rate` gives a figure [n] to each answer by the question's ids, the pictures and the answers' ids."""
    prompt, seen = prompt_ids(processor, QUESTION), pixels[pairs.picture]

    def rates(digits: Digits) -> Tensor:
        responses = response_ids(processor, [answer(row) for row in digits])
        parts = zip(seen.split(BATCH), responses.split(BATCH), strict=True)
        return torch.cat([rate(prompt, part, told) for part, told in parts])

    gap = rates(pairs.chosen) - rates(pairs.rejected)
    return float((gap > 0).float().mean()), float(gap.mean())


def score(model: Any, processor: Any, pixels: Tensor, digits: Digits, pairs: Pairs) -> Scores:
    told = np.array([found or [-1] * SLOTS for found in ask(model, processor, pixels)])
    right = told == digits
    return Scores(*preference(model, processor, pixels, pairs), float(right.mean()), float(right.all(1).mean()))


def shuffled(pixels: Tensor, seed: int) -> Tensor:
    """The pictures in another order, none in its own place."""
    order = np.random.default_rng(seed).permutation(len(pixels))
    moved = torch.empty_like(pixels)
    moved[order] = pixels[np.roll(order, 1)]
    return moved
