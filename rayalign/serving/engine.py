"""A model with its adapters that responds to conversations: in batches, token by token.

The prompt's tokens are those of training (`data.encode`), the forward is transformers' own `generate`. Nothing here knows of
HTTP or Ray: `app` and `chat` call it. Reward models are in `scorer`.
"""

import copy
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.downloads import model_folder
from rayalign.formats.records import Message, record_errors
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.policy.adapter_files import read_adapter
from rayalign.policy.compat import set_active_adapters, without_peft_warnings
from rayalign.policy.weights import load_weights
from rayalign.serving.batching import Batcher
from rayalign.serving.conversation import record_of
from rayalign.serving.response_text import ResponseText

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]

PLACEHOLDER = "-"
"""Stands for the response where a prompt is encoded: only a record with a response is one."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: at `temperature` 0 the likeliest, else drawn among the likeliest that have `top_p` together. The
    same `seed` draws the same response, whatever else is in the batch. A `stop` text ends the response before it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the response as the model takes it: the processor's tensors, [1, tokens] and of the images."""

    inputs: Mapping[str, Tensor]

    @property
    def num_tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True)
class Piece:
    """Some more text of a response, and how many tokens it has by now; the last piece says why it ends."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class GenerationFailed(RuntimeError):
    """A batch failed while it ran, through no fault of the request."""


@dataclass
class Generation:
    """A response that is asked for: waits, runs, and tells `on_piece` what comes of it, the last time with a piece that says
    why it ends, or with the error that ended it. `cancel` ends it without another word."""

    adapter: str | None
    prompt: Prompt
    sampling: Sampling
    on_piece: Callable[[Piece | GenerationFailed], None]
    done: bool = False

    def cancel(self) -> None:
        self.done = True


@dataclass
class _Row:
    """A generation that runs."""

    generation: Generation
    text: ResponseText
    generator: torch.Generator | None
    num_tokens: int = 0

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Takes the token that was chosen, and says what comes of it."""
        generation = self.generation
        if generation.done:
            return
        reason: FinishReason | None = None
        if token in ends:
            text, reason = self.text.finish(), "stop"
        else:
            self.num_tokens += 1
            text = self.text.add(token)
            if self.num_tokens == generation.sampling.max_new_tokens:
                text, reason = text + self.text.finish(), "length"
            if self.text.stopped:
                reason = "stop"
        if text or reason:
            generation.done = reason is not None
            generation.on_piece(Piece(text, self.num_tokens, reason))


class Engine:
    """Responds with a base model and adapters on it. `names` are what requests call them by; a name's adapter is that of
    `adapters`, None for the model without one.

    One thread runs the model, a batch after another; a batch is of one adapter.
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        adapters: Mapping[str, str | None],
        *,
        max_batch_size: int,
        wait_seconds: float,
    ) -> None:
        self._model, self._encoder, self._adapters = model, encoder, dict(adapters)
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._ends = _end_tokens(base, encoder.tokenizer)
        # No other setting of the model's own counts, as in training: neither a penalty nor a temperature.
        # `_Follow` ends rows.
        base.generation_config = GenerationConfig(pad_token_id=encoder.spec.layout.pad_token_id)
        self._base: Any = base
        # Tokenizers are not made for several threads: one at a time encodes, and responses are decoded by a copy.
        self._encoding, self._tokenizer = threading.Lock(), copy.deepcopy(encoder.tokenizer)
        self._batcher = Batcher(
            self._run,
            key=lambda generation: (generation.adapter, frozenset(generation.prompt.inputs)),
            max_batch_size=max_batch_size,
            wait_seconds=wait_seconds,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def num_open(self) -> int:
        """Responses that wait or are generated."""
        return self._batcher.num_open

    def prepare(self, messages: Sequence[Message], images: Sequence[bytes]) -> Prompt:
        """The prompt of a conversation, whose `<image>` marks stand for the images. Raises RecordError for what can't be
        encoded, or is too long."""
        with record_errors():
            record = record_of(messages, images, PLACEHOLDER)
            with self._encoding:
                length = len(self._encoder.encode(record, images).prompt_ids)
                inputs = self._encoder.plain_row(record, images, "chosen")
        shape = inputs["input_ids"].shape
        return Prompt({name: value[:, :length] if value.shape == shape else value for name, value in inputs.items()})

    def submit(
        self, name: str, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece | GenerationFailed], None]
    ) -> Generation:
        """Asks for a response of the model of that name; `on_piece` is called on the engine's own thread."""
        generation = Generation(self._adapters[name], prompt, sampling, on_piece)
        self._batcher.submit(generation)
        return generation

    def respond(self, name: str, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """The pieces of a response as they come; it is cancelled where the caller stops listening."""
        pieces: queue.SimpleQueue[Piece | GenerationFailed] = queue.SimpleQueue()
        generation = self.submit(name, prompt, sampling, pieces.put)
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, GenerationFailed):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            generation.cancel()

    def _run(self, generations: Sequence[Generation]) -> None:
        generations = [generation for generation in generations if not generation.done]
        if not generations:
            return
        try:
            self._generate(generations)
        except Exception as error:  # whatever goes wrong must not end the thread, on which all others wait
            logger.exception("A batch of %d responses failed", len(generations))
            for generation in generations:
                if not generation.done:
                    generation.done = True
                    generation.on_piece(GenerationFailed(f"{type(error).__name__}: {str(error)[:200]}"))

    def _generate(self, generations: Sequence[Generation]) -> None:
        for layer in self._layers:
            set_active_adapters(layer, [adapter] if (adapter := generations[0].adapter) else [])
        device = self._base.get_input_embeddings().weight.device
        rows = [
            _Row(
                generation,
                ResponseText(self._tokenizer, generation.sampling.stop),
                torch.Generator(device).manual_seed(generation.sampling.seed) if generation.sampling.temperature else None,
            )
            for generation in generations
        ]
        inputs = side_by_side([g.prompt.inputs for g in generations], pad_token_id=self._encoder.spec.layout.pad_token_id)
        placed = {name: _placed(value, device, self._base.dtype) for name, value in inputs.items()}
        with torch.inference_mode():
            self._base.generate(
                **placed,
                do_sample=False,
                max_new_tokens=max(generation.sampling.max_new_tokens for generation in generations),
                logits_processor=LogitsProcessorList([_Draw(rows)]),
                stopping_criteria=StoppingCriteriaList([_Follow(rows, self._ends)]),
            )


class _Draw(LogitsProcessor):
    """Leaves to a row that draws its tokens only the one that it draws."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, logits in zip(self._rows, scores, strict=True):
            if row.generator is not None:
                token = draw(logits, row.generation.sampling, row.generator)
                logits.fill_(-torch.inf)[token] = 0
        return scores


class _Follow(StoppingCriteria):
    """Hands each row the token that was chosen, and says which rows are done."""

    def __init__(self, rows: Sequence[_Row], ends: frozenset[int]) -> None:
        self._rows, self._ends = rows, ends

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token, self._ends)
        return torch.tensor([row.generation.done for row in self._rows], device=input_ids.device)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its logits [V]: among the likeliest whose probabilities reach `top_p` together."""
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        # A token stays where those before it do not reach top_p by themselves; the first one always does.
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def side_by_side(prompts: Sequence[Mapping[str, Tensor]], *, pad_token_id: int) -> dict[str, Tensor]:
    """Several prompts' inputs as those of one batch: tokens padded on the left, so that all end together; the tensors of the
    images behind one another, smaller ones filled up with zeros, as processors do it."""
    batch: dict[str, Tensor] = {}
    longest = max(inputs["input_ids"].shape[1] for inputs in prompts)
    for name in prompts[0]:
        values = [inputs[name] for inputs in prompts]
        if all(value.shape == inputs["input_ids"].shape for value, inputs in zip(values, prompts, strict=True)):
            fill = pad_token_id if name == "input_ids" else 0
            values = [torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
        else:
            sizes = [max(dimension) for dimension in zip(*(value.shape[1:] for value in values), strict=True)]
            values = [_filled(value, sizes) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor [n, ...] with zeros behind what it has, up to `sizes` in all dimensions but the first."""
    missing = [size - has for size, has in zip(sizes, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [n for size in reversed(missing) for n in (0, size)])


def _placed(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response: the one that trained responses end with, and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return frozenset({tokenizer.eos_token_id, *listed})


def load_engine(
    source: ModelSource,
    name: str,
    adapters: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    max_pixels: int | None,
    max_batch_size: int,
    wait_seconds: float,
) -> Engine:
    """Loads the model of `source` (with its adapter, where it has one) as `name`, and beside it the adapters by their names.

    Raises ValueError for weights and adapters that are not whole, or do not fit.
    """
    source = source.here()
    family = find_family(load_config(source.base).model_type)
    base = load_weights(family.auto_class, source.base, needs_output_head=True, dtype=dtype).to(device).eval()
    folders = {name: source.adapter, **adapters}
    # peft takes no dots in its names of adapters, and ours may have any.
    internal = {name: None if folder is None else f"adapter{i}" for i, (name, folder) in enumerate(folders.items())}
    model = _with_adapters(base, {own: folder for name, folder in folders.items() if folder and (own := internal[name])})
    encoder = Encoder(EncoderSpec(source.base, "chosen", max_length=max_length, max_pixels=max_pixels))
    return Engine(model.eval(), encoder, internal, max_batch_size=max_batch_size, wait_seconds=wait_seconds)


def _with_adapters(base: Any, folders: Mapping[str, str]) -> Any:
    """The model with adapters beside each other, by peft's names. All of them are read before the first one is put on, which
    gives the model's layers other names."""
    found = {name: read_adapter(base, model_folder(folder, weights=True)) for name, folder in folders.items()}
    model = base
    with without_peft_warnings():
        for number, (name, adapter) in enumerate(found.items()):
            if number == 0:
                model = adapter.wrap(base, name, trainable=False, fused=False)
            else:
                adapter.add(model, name)
    return model
