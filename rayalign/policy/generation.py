"""What the policy itself says to a prompt, by the forward that it is trained with: its likeliest token each time, or a sample.

Nothing of a training changes by it: no random number is drawn but from seeds of the prompts' own, no mode and no compiled code
is another one afterwards.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from rayalign.data.batch import PairBatch, assemble
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.store import EncodedPair
from rayalign.policy.policy import Policy
from rayalign.policy.sharding import agreed


def generate_answers(policy: Policy, spec: EncoderSpec, pairs: Sequence[EncodedPair], *, max_new_tokens: int) -> list[str]:
    """The policy's own greedy answer to the prompt of each pair, one after another, as text without the end token."""
    ends = end_tokens(policy, spec)
    answers = []
    with as_trained(policy):
        for pair in pairs:
            prompt = dataclasses.replace(pair, chosen_ids=[], rejected_ids=[], reference=None)
            batch = assemble([prompt], layout=spec.layout, process_images=image_processing(spec)).to(policy.device)
            ids = greedy_ids(policy, batch, end_tokens=ends, max_new_tokens=max_new_tokens)
            answers.append(spec.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


def greedy_ids(policy: Policy, batch: PairBatch, *, end_tokens: frozenset[int], max_new_tokens: int) -> list[int]:
    """The likeliest token behind the batch's one prompt, the likeliest behind that, and so on to an end token, which is left
    out, or to the limit. No setting of the model's generation config but its end tokens counts."""
    cache = DynamicCache(config=policy.base.get_decoder().config)
    position_ids = batch.position_ids.amax().expand(*batch.position_ids.shape[:-1], 1)
    ids: list[int] = []
    logits = policy.logits_behind_prompt(batch, policy.image_features(batch), cache)
    while (token := agreed(policy, int(logits.argmax()))) not in end_tokens:
        ids.append(token)
        if len(ids) == max_new_tokens:
            break
        position_ids = position_ids + 1
        (logits,) = policy.logits_behind_tokens(torch.tensor([[token]], device=policy.device), position_ids, cache)
    return ids


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: `n` of each prompt, of at most `max_new_tokens`. With a `temperature` of 0 each token is the
    likeliest one; else it is drawn from the likeliest tokens that have the probability `top_p` together."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 42

    def draws(self, key: str) -> NDArray[np.float64]:
        """Uniform numbers [n, max_new_tokens] for the responses to the prompt with some key. They depend on the seed, the key
        and the response's number alone."""
        digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        own = [np.random.default_rng([self.seed, digest, k]) for k in range(self.n)]
        return np.stack([draw.random(self.max_new_tokens) for draw in own])


@dataclass(frozen=True)
class Response:
    """The ids that a policy put behind a prompt, and whether it ended by itself: the end token is left out."""

    ids: list[int]
    is_ended: bool


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the policy has read: the keys and values of its tokens, the logits [V] of what follows, and the position
    [1, 1] or [3, 1, 1] of its last token."""

    cache: DynamicCache
    logits: Tensor
    position_ids: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.cache.get_seq_length())


def sample_responses(
    policy: Policy, spec: EncoderSpec, prompts: Sequence[EncodedPair], sampling: Sampling
) -> list[list[Response]]:
    """`sampling.n` responses to each prompt, all at once; each prompt is read once, by itself. What comes out for a prompt
    depends on its `id` and the seed, and on the other prompts only as far as they change the rounding of a sum. A response
    ends where it and its prompt have the encoder's max_length together, if not before."""
    ends = end_tokens(policy, spec)
    draws = np.concatenate([sampling.draws(prompt.id) for prompt in prompts])
    with as_trained(policy):
        read = [_prefill(policy, spec, prompt) for prompt in prompts]
        rooms = [max(1, spec.max_length - prompt.num_tokens) for prompt in read]
        longest = [min(room, sampling.max_new_tokens) for room in rooms for _ in range(sampling.n)]
        draws_there = torch.as_tensor(draws, device=policy.device)
        responses = _continue(policy, read, sampling, draws=draws_there, longest=longest, ends=ends)
    return [responses[i : i + sampling.n] for i in range(0, len(responses), sampling.n)]


def _prefill(policy: Policy, spec: EncoderSpec, prompt: EncodedPair) -> Prefilled:
    alone = dataclasses.replace(prompt, chosen_ids=[], rejected_ids=[], eval_rejected_ids=[], reference=None)
    return prefill(policy, assemble([alone], layout=spec.layout, process_images=image_processing(spec)).to(policy.device))


def prefill(policy: Policy, batch: PairBatch) -> Prefilled:
    """Reads the one prompt of a batch. Raises FloatingPointError where what should follow it are no numbers."""
    cache = DynamicCache()  # without windows: where they lie is told by the mask, for prompts of any length side by side
    logits = policy.logits_behind_prompt(batch, policy.image_features(batch), cache)
    if not is_sound(logits):
        raise no_numbers("a prompt")
    return Prefilled(cache, logits, batch.position_ids.amax().expand(*batch.position_ids.shape[:-1], 1))


def is_sound(logits: Tensor) -> Tensor:
    """Of logits [..., V] whether a token can be chosen by them, [...]."""
    return logits.amax(-1).isfinite()


def no_numbers(what: str) -> FloatingPointError:
    """The error of logits that are not sound."""
    return FloatingPointError(
        f"what the model makes of {what} are no numbers: its weights are damaged, or too large for its type (--dtype)"
    )


def _continue(
    policy: Policy,
    read: Sequence[Prefilled],
    sampling: Sampling,
    *,
    draws: Tensor,
    longest: Sequence[int],
    ends: frozenset[int],
) -> list[Response]:
    """The responses to prompts, `sampling.n` of each one, of at most `longest` [R] tokens; `draws` [R, max_new_tokens] decide
    what is drawn. Raises FloatingPointError where what should follow one that is not done are no numbers."""
    cache, is_token = _side_by_side(read, sampling.n)
    logits = torch.stack([prompt.logits for prompt in read]).repeat_interleave(sampling.n, 0)
    shape = max((prompt.position_ids.shape for prompt in read), key=len)  # with three axes where a prompt has images with them
    position_ids = torch.cat([prompt.position_ids.expand(shape) for prompt in read], -2).repeat_interleave(sampling.n, -2)
    end_ids = torch.tensor(sorted(ends), device=logits.device)
    ids: list[list[int]] = [[] for _ in range(len(logits))]
    ended = [False] * len(ids)
    rows = list(range(len(ids)))  # those that the tensors hold
    for step in range(max(longest)):
        tokens = choose(logits, draws[rows, step], sampling)
        are_ends, are_sound = torch.isin(tokens, end_ids).tolist(), is_sound(logits).tolist()
        for row, token, is_end, is_number in zip(rows, tokens.tolist(), are_ends, are_sound, strict=True):
            if not ended[row] and len(ids[row]) < longest[row]:
                if not is_number:
                    raise no_numbers("a response")
                ended[row] = is_end
                ids[row] += [] if is_end else [token]
        left = [place for place, row in enumerate(rows) if not ended[row] and len(ids[row]) < longest[row]]
        if not left:
            break
        if 2 * len(left) <= len(rows):  # half of the work would be for nothing
            rows, kept = [rows[place] for place in left], torch.tensor(left, device=tokens.device)
            for layer in layers_of(cache):
                layer.batch_select_indices(kept.to(layer.keys.device))
            tokens, is_token, position_ids = tokens[kept], is_token[kept], position_ids[..., kept, :]
        is_token = torch.nn.functional.pad(is_token, (0, 1), value=True)
        position_ids = position_ids + 1
        logits = policy.logits_behind_tokens(tokens[:, None], position_ids, cache, is_token)
    return [Response(*response) for response in zip(ids, ended, strict=True)]


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The next token [R] of each row by its logits [R, V]: the likeliest, or the one in whose share of the probabilities a
    number from `draws` [R] falls. Tokens lie there in the order of their ids, so that a logit that is rounded otherwise moves a
    border a little and changes no order."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= sampling.top_p, 1.0).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    shares = probabilities.cumsum(-1)
    return (shares <= draws.to(shares)[:, None] * shares[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def layers_of(cache: DynamicCache) -> list[Any]:
    """A cache's layers with keys and values of their own; some models' last ones use those of others."""
    layers: list[Any] = list(cache.layers)
    return [layer for layer in layers if layer.is_initialized]


def _side_by_side(read: Sequence[Prefilled], n: int) -> tuple[DynamicCache, Tensor]:
    """The prompts' keys and values as one cache of n rows for each, padded in front, and which of its places [R, K] are no
    padding."""
    longest = max(prompt.num_tokens for prompt in read)
    together = DynamicCache()

    def pad(states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, longest - states.shape[-2], 0))

    own = layers_of(read[0].cache)
    numbers = [number for number, layer in enumerate(read[0].cache.layers) if layer in own]
    for number, layers in zip(numbers, zip(*(layers_of(prompt.cache) for prompt in read), strict=True), strict=True):
        keys, values = (
            torch.cat([pad(getattr(layer, kind)) for layer in layers]).repeat_interleave(n, 0) for kind in ("keys", "values")
        )
        together.update(keys, values, number)
    sizes = torch.tensor([prompt.num_tokens for prompt in read]).repeat_interleave(n)
    places = torch.arange(longest)
    return together, (places >= longest - sizes[:, None]).to(read[0].logits.device)


def end_tokens(policy: Policy, spec: EncoderSpec) -> frozenset[int]:
    """The tokens that end a response: the one that trained responses end with, and those of the model's generation config."""
    own = policy.base.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return frozenset({spec.tokenizer.eos_token_id, *listed})


@contextmanager
def as_trained(policy: Policy) -> Iterator[None]:
    """Within it, the policy is as a user of the trained model has it: no dropout, no checkpointing of activations, no graph.
    Compiled layers run as they are written: other shapes and a cache would make new code of them, of which there is only so
    much."""
    training = [module for module in policy.model.modules() if module.training]
    policy.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
