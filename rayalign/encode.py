"""A preference record becomes token ids: chat template, image tokens, responses, truncation; everything a batch needs.

`records` come in, `EncodedPair`s go out to `prepared` (storage) and `batch` (tensors). Image-token agreement is checked here,
where a record can still be dropped with a reason.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoConfig, AutoProcessor

from rayalign.images import image_hash, open_image
from rayalign.images.damage import damage_image
from rayalign.models import Family, find_family
from rayalign.prepared import EncodedPair
from rayalign.records import IMAGE_MARK, Message, PreferenceRecord, RecordError, Responses

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EncoderSpec:
    """Everything the encoding depends on besides the record; `fingerprint` keys the cache of encoded data.

    `model` is a folder or hub id with processor and config. Rows hold the chosen response, both, or either (a pair's both, or
    the one reply of a labelled record: chosen where it is good, else rejected).
    """

    model: str
    responses: Responses
    max_length: int = 2048
    truncation_strategy: Literal["delete", "left", "right", "raise"] = "delete"
    max_pixels: int | None = None
    trust_remote_code: bool = False

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def model_config(self) -> Any:
        return AutoConfig.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def family(self) -> Family:
        return find_family(self.model_config.model_type)

    def fingerprint(self) -> str:
        """Hex digest of the processor's files (tokenizer, chat template, image settings), the model's config and the
        settings."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            self.processor.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.name.encode() + b"\0" + file.read_bytes())
        config = {
            k: v for k, v in self.model_config.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")
        }
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "model"}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Encoder:
    """Encodes records for one model; made once per process, since it loads the processor."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.processor = spec.processor
        self.tokenizer = self.processor.tokenizer
        self.image_token_id: int = spec.model_config.image_token_id

    def encode(self, record: PreferenceRecord, images: Sequence[bytes]) -> EncodedPair:
        """Encodes a record with its images' bytes; raises RecordError where it cannot be trained on."""
        messages, images = list(record.messages), list(images)
        limit = self.spec.max_length
        while True:
            prompt, responses = self._render(messages, record)
            prompt_ids = self._prompt_ids(prompt, images)
            response_ids = {side: self._response_ids(text, side) for side, text in responses.items()}
            length = len(prompt_ids) + max(map(len, response_ids.values()))
            if length <= limit:
                break
            if self.spec.truncation_strategy == "raise":
                raise ValueError(
                    f"Record {record.id} has {length} tokens and --max_length is {limit}. "
                    "Raise --max_length, lower --max_pixels, or choose another --truncation_strategy."
                )
            if self.spec.truncation_strategy == "left" and _drop_oldest_round(messages, images):
                continue
            if self.spec.truncation_strategy == "right" and len(prompt_ids) < limit:
                response_ids = {side: ids[: limit - len(prompt_ids)] for side, ids in response_ids.items()}
                if response_ids.get("chosen") == response_ids.get("rejected"):
                    raise RecordError(
                        "identical answers", f"the answers are the same after the cut to {limit} tokens", field="rejected"
                    )
                break
            raise RecordError("too long", f"{length} tokens, --max_length is {limit}", field="messages")
        return EncodedPair(
            id=record.id,
            prompt_ids=prompt_ids,
            chosen_ids=response_ids.get("chosen", []),
            rejected_ids=response_ids.get("rejected", []),
            images=images,
            image_hashes=[image_hash(content) for content in images],
            margin=record.margin or 0.0,
        )

    def _render(self, messages: Sequence[Message], record: PreferenceRecord) -> tuple[str, dict[str, str]]:
        """The prompt's text up to where the model answers, and each response's text as the chat template ends it, by side."""
        turns = [{"role": m.role, "content": _content_parts(m.content)} for m in messages]
        prompt: str = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        responses = {}
        eos = self.tokenizer.eos_token
        for side, answer in _answers(record, self.spec.responses).items():
            if eos in answer:
                raise RecordError("end mark in answer", f"an answer holds {eos}, which would end it early", field=side)
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            whole: str = self.processor.apply_chat_template([*turns, turn])
            if not whole.startswith(prompt):
                raise ValueError(
                    f"The chat template of {self.spec.model} renders a prompt differently once it is answered, so it can't "
                    f"be told where "
                    f"the answer begins. Prompt: {prompt[-80:]!r}; with answer: {whole[: len(prompt) + 20][-100:]!r}. "
                    "Give the processor a template whose generation prompt is a prefix of the answered conversation."
                )
            response = whole[len(prompt) :]
            responses[side] = response if eos in response else response.rstrip() + eos
        return prompt, responses

    def _prompt_ids(self, prompt: str, images: Sequence[bytes]) -> list[int]:
        opened = [open_image(content, max_pixels=self.spec.max_pixels) for content in images]
        has_bos = self.tokenizer.bos_token is not None and prompt.startswith(self.tokenizer.bos_token)
        inputs = self.processor(text=[prompt], images=[opened] if opened else None, add_special_tokens=not has_bos)
        ids: list[int] = list(inputs["input_ids"][0])
        expected = sum(self.spec.family.image_token_counts(self.spec.model_config, inputs)) if opened else 0
        found = ids.count(self.image_token_id)
        if found != expected:
            raise RecordError(
                "image token mismatch",
                f"{found} image tokens in the prompt, but the model makes {expected} features of the {len(images)} images; "
                "the processor's settings (patch_size, vision_feature_select_strategy) don't fit the model",
                field="images",
            )
        return ids

    def _response_ids(self, text: str, side: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.image_token_id in ids:
            raise RecordError("image mark in answer", "an answer holds the image token", field=side)
        return ids


def image_processing(spec: EncoderSpec) -> Callable[[Sequence[bytes]], "Mapping[str, Tensor]"]:
    """The function that turns images' bytes into the model's image inputs, as the encoder saw them."""
    process = spec.processor.image_processor

    def process_images(contents: Sequence[bytes]) -> "Mapping[str, Tensor]":
        opened = [open_image(content, max_pixels=spec.max_pixels) for content in contents]
        return dict(process(opened, return_tensors="pt"))

    return process_images


def damaged_image_processing(spec: EncoderSpec) -> Callable[[Sequence[bytes], Sequence[str]], "Mapping[str, Tensor]"]:
    """The same for images of which little is left; each comes with the seed of its damage."""
    process = spec.processor.image_processor

    def process_damaged(contents: Sequence[bytes], seeds: Sequence[str]) -> "Mapping[str, Tensor]":
        opened = [open_image(content, max_pixels=spec.max_pixels) for content in contents]
        damaged = [damage_image(image, seed=seed) for image, seed in zip(opened, seeds, strict=True)]
        return dict(process(damaged, return_tensors="pt"))

    return process_damaged


def _answers(record: PreferenceRecord, responses: Responses) -> dict[str, str]:
    """The replies that a row holds, by side."""
    if record.rejected is None or responses == "chosen":
        is_bad = responses == "either" and record.label is False
        return {"rejected" if is_bad else "chosen": record.chosen}
    return {"chosen": record.chosen, "rejected": record.rejected}


def _content_parts(text: str) -> list[dict[str, str]]:
    """`"a <image> b"` as the list of text and image parts that chat templates take."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _drop_oldest_round(messages: list[Message], images: list[bytes]) -> bool:
    """Takes the oldest question and its reply away, with their images; False when only the last question is left."""
    start = 1 if messages[0].role == "system" else 0
    if len(messages) - start < 3:
        return False
    dropped = sum(m.content.count(IMAGE_MARK) for m in messages[start : start + 2])
    del messages[start : start + 2]
    del images[:dropped]
    return True
