"""A model with its adapters that responds to conversations: many side by side, token by token.

Prompts have the tokens of training (`data.encode`), and the forward is that of training, too (`policy`). Nothing here knows of
HTTP or Ray: `app` and `chat` call it, and `loading` makes it. Reward models are in `scorer`.
"""

import contextlib
import copy
import dataclasses
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from rayalign.data.batch import assemble
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import image_processing
from rayalign.formats.records import Message, record_errors
from rayalign.policy.compat import set_active_adapters
from rayalign.policy.generation import end_tokens, is_sound, no_numbers, prefill
from rayalign.policy.policy import Policy
from rayalign.policy.sequences import Sequences
from rayalign.serving.conversation import record_of
from rayalign.serving.response import Generation, GenerationFailed, Piece, Prompt, Sampling
from rayalign.serving.response_text import ResponseText

logger = logging.getLogger(__name__)

PLACEHOLDER = "-"
"""Stands for the response where a prompt is encoded: only a record with a response is one."""


@dataclasses.dataclass
class _Running:
    """The responses of one adapter that run: row i of `sequences` is that of `generations[i]`."""

    sequences: Sequences
    generations: list[Generation] = dataclasses.field(default_factory=list)


class Engine:
    """Responds with a base model and adapters on it. `names` are what requests call them by; a name's adapter is that of
    `adapters`, None for the model without one.

    One thread runs the model, in turns: in each, one response that waits begins, where fewer than `max_batch_size` run, and all
    that run get one more token, adapter by adapter. So nobody waits for the end of another's response, and a response pauses
    for one prompt at the most.
    """

    def __init__(self, policy: Policy, encoder: Encoder, adapters: Mapping[str, str | None], *, max_batch_size: int) -> None:
        self._policy, self._encoder, self._adapters = policy, encoder, dict(adapters)
        self._layers = [module for module in policy.model.modules() if isinstance(module, BaseTunerLayer)]
        # No other setting of the model's own counts, as in training: neither a penalty nor a temperature.
        self._ends = end_tokens(policy, encoder.spec)
        # Tokenizers are not made for several threads: one at a time encodes, and responses are decoded by a copy.
        self._encoding, self._tokenizer = threading.Lock(), copy.deepcopy(encoder.tokenizer)
        self._max_batch_size = max_batch_size
        self._waiting: deque[Generation] = deque()
        self._running: dict[str | None, _Running] = {}
        self._num_running = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="responses", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def num_open(self) -> int:
        """Responses that wait or are generated."""
        return len(self._waiting) + self._num_running

    def prepare(self, messages: Sequence[Message], images: Sequence[bytes]) -> Prompt:
        """The prompt of a conversation, whose `<image>` marks stand for the images. Raises RecordError for what can't be
        encoded, or is too long."""
        spec = self._encoder.spec
        with record_errors(), self._encoding:
            pair = self._encoder.encode(record_of(messages, images, PLACEHOLDER), images)
            alone = dataclasses.replace(pair, chosen_ids=[])
            return Prompt(assemble([alone], layout=spec.layout, process_images=image_processing(spec)))

    def submit(
        self, name: str, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece | GenerationFailed], None]
    ) -> Generation:
        """Asks for a response of the model of that name, which ends where prompt and response have the encoder's max_length
        together; `on_piece` is called on the engine's own thread."""
        room = max(1, self._encoder.spec.max_length - prompt.num_tokens)
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        text = ResponseText(self._tokenizer, sampling.stop)
        generation = Generation(self._adapters[name], prompt, sampling, text, on_piece)
        with self._changed:
            self._waiting.append(generation)
            self._changed.notify()
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

    def close(self) -> None:
        """Ends the engine's thread, and with it whatever is left of responses: a program that ends while the thread is inside
        of torch's code would be aborted."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        while not self._closed:
            generation = self._next()
            if generation is not None and not generation.done:
                self._begin(generation)
            for adapter, running in list(self._running.items()):
                self._go_on(adapter, running)
            self._leave_out_the_done()

    def _next(self) -> Generation | None:
        """Who has waited longest, where there is room beside those that run; where none runs, as soon as somebody comes."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            if not self._waiting or self._num_running >= self._max_batch_size:
                return None
            self._num_running += 1
            return self._waiting.popleft()

    def _begin(self, generation: Generation) -> None:
        """Reads a prompt, by itself, and chooses the first token behind it."""
        with _told_to([generation]):
            self._activate(generation.adapter)
            prompt = prefill(self._policy, generation.prompt.batch.to(self._policy.device))
            self._hand_out(prompt.logits[None], [generation])
        if not generation.done:
            running = self._running.setdefault(generation.adapter, _Running(Sequences(self._policy)))
            running.generations.append(generation)
            with _told_to(running.generations):
                running.sequences.join(prompt)

    def _go_on(self, adapter: str | None, running: _Running) -> None:
        """One more token of each response of an adapter."""
        if all(generation.done for generation in running.generations):  # cancelled, or failed as they were joined
            return
        with _told_to(running.generations):
            self._activate(adapter)
            logits = running.sequences.step([generation.last for generation in running.generations])
            self._hand_out(logits, running.generations)

    def _leave_out_the_done(self) -> None:
        for adapter, running in list(self._running.items()):
            rows = [row for row, generation in enumerate(running.generations) if not generation.done]
            if rows:
                with _told_to(running.generations):
                    running.sequences.keep(rows)
                running.generations = [running.generations[row] for row in rows]
            else:
                del self._running[adapter]
        self._num_running = sum(len(running.generations) for running in self._running.values())

    def _activate(self, adapter: str | None) -> None:
        for layer in self._layers:
            set_active_adapters(layer, [] if adapter is None else [adapter])

    def _hand_out(self, logits: Tensor, generations: Sequence[Generation]) -> None:
        """Chooses each response's next token by its row of the logits [R, V]. What goes wrong with one row ends its response
        alone; on a GPU a draw from what are no numbers would end all that the process does there."""
        sound = is_sound(logits).tolist()
        for generation, is_number, likeliest, row in zip(generations, sound, logits.argmax(-1).tolist(), logits, strict=True):
            with _told_to([generation]):
                if not is_number:
                    raise no_numbers("a response")
                generation.take(generation.chosen(likeliest, row), self._ends)


@contextlib.contextmanager
def _told_to(generations: Iterable[Generation]) -> Iterator[None]:
    """Whatever goes wrong within it ends these responses, and not the thread, on which all others wait."""
    try:
        yield
    except Exception as error:
        open_ones = [generation for generation in generations if not generation.done]
        logger.exception("%d responses failed", len(open_ones))
        for generation in open_ones:
            generation.fail(error)
