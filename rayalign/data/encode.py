"""A preference record becomes token ids: chat template, image tokens, responses, truncation; everything a batch needs.

`formats.records` come in, `EncodedPair`s go out to `store` and to `batch` (tensors). Images are decoded, which finds broken
ones, and the tokens that stand for them follow from their sizes. That the model makes as many features is checked here, where a
record can still be dropped with a reason, and by `batch` once more, of the pixels.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayalign.data.chat_template import ChatTemplate, Turns
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.data.text_ids import ResponseIds, TextIds
from rayalign.data.truncation import RecordTooLong, count_older_rounds, next_cut, without_oldest_round
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord, RecordError, Responses, record_errors
from rayalign.images.fetch import check_pixels, decoded_size, image_hash, image_size, open_image
from rayalign.models.image_shapes import ShapeProcessor, Size, shape_processor
from rayalign.models.processors import check_resized, describe_images

MAX_BYTES_PER_TOKEN = 64
"""Texts of more bytes a token than this don't fit --max_length, whatever the tokenizer: they aren't tokenized at all."""


class Encoded(NamedTuple):
    """An encoded pair, and whether a token would cross from its prompt into a response, if both were tokenized as one text."""

    pair: EncodedPair
    crosses_seam: bool


class Picture(NamedTuple):
    """An image of a record: its bytes, and its size as the processor will see it; None where only the processor itself can tell
    what it writes for it."""

    content: bytes
    size: Size | None


class Encoder:
    """Encodes records for one model; made once per process, since it loads the processor."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.processor = spec.processor
        self.tokenizer = spec.tokenizer
        self.image_token_id = spec.layout.image_token_id
        chat_template = _text_of_template(spec)
        if self.tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {spec.model} names no end token, with which each response ends. Put its eos_token into "
                "tokenizer_config.json."
            )

        def apply(turns: Turns, begin_response: bool) -> str:
            rendered: str = self.processor.apply_chat_template(
                turns, chat_template=chat_template, add_generation_prompt=begin_response, tokenize=False
            )
            return rendered

        self.chat_template = ChatTemplate(apply, model=spec.model, image_token=self._image_token())
        self._texts = TextIds(self.tokenizer)

    def encode(self, record: PreferenceRecord, images: Sequence[bytes]) -> EncodedPair:
        """Encodes a record with its images' bytes; raises RecordError where it cannot be trained on."""
        return self.encode_seen(record, images).pair

    def encode_seen(self, record: PreferenceRecord, images: Sequence[bytes]) -> Encoded:
        """`encode`, with what there is to say about the record."""
        messages = list(record.messages)
        limit, strategy = self.spec.max_length, self.spec.truncation_strategy
        self._check_sizes(record, images)
        prompt, responses = self._render(messages, record)
        pictures = self._look_at(images)
        while True:
            prompt_ids, found = self._ids(prompt, responses, pictures)
            response_ids = {side: response.ids for side, response in found.items()}
            longest, rounds = max(map(len, response_ids.values())), count_older_rounds(messages)
            cut = next_cut(len(prompt_ids), longest, older_rounds=rounds, max_length=limit, strategy=strategy)
            if cut != "oldest round":
                break
            messages, pictures = without_oldest_round(messages, pictures)
            prompt, responses = self._render(messages, record)
        length = len(prompt_ids) + longest
        match cut:
            case "run":
                raise RecordTooLong(
                    f"Record {record.id} has {length} tokens and --max_length is {limit}. "
                    "Raise --max_length, lower --max_pixels, or choose another --truncation_strategy."
                )
            case "record":
                raise RecordError("too long", f"{length} tokens, --max_length is {limit}", field="messages")
            case "responses":
                response_ids = {side: ids[: limit - len(prompt_ids)] for side, ids in response_ids.items()}
                if response_ids.get("chosen") == response_ids.get("rejected"):
                    raise RecordError(
                        "identical responses", f"the responses are the same after the cut to {limit} tokens", field="rejected"
                    )
        pair = EncodedPair(
            id=record.id,
            prompt_ids=prompt_ids,
            chosen_ids=response_ids.get("chosen", []),
            rejected_ids=response_ids.get("rejected", []),
            images=[picture.content for picture in pictures],
            image_hashes=[image_hash(picture.content) for picture in pictures],
            margin=record.margin or 0.0,
            eval_rejected_ids=self._eval_rejected_ids(messages, record, prompt, limit - len(prompt_ids)),
            conversation=json.dumps([(message.role, message.content) for message in messages]),
        )
        return Encoded(pair, any(response.crosses_seam for response in found.values()))

    def _eval_rejected_ids(self, messages: Sequence[Message], record: PreferenceRecord, prompt: str, room: int) -> list[int]:
        """The rejected response of a row that trains on the chosen one, to compare the two; none where it could not be trained
        on, which is no reason to drop the record."""
        rejected = record.rejected
        if self.spec.responses != "chosen" or rejected is None or len(rejected.encode()) > self._most_bytes:
            return []
        try:
            with record_errors():
                self._refuse_special_tokens(rejected, "rejected")
                written = self._written(messages, rejected, "rejected")[1]
                ids = self._texts.responses(self._text_prompt(prompt), {"rejected": written})["rejected"].ids
        except RecordError:
            return []
        return [] if self.image_token_id in ids or len(ids) > room else ids

    def _check_sizes(self, record: PreferenceRecord, images: Sequence[bytes]) -> None:
        """Raises RecordError for texts and pictures that can't fit, before any work is done on them."""
        texts = [*(message.content for message in record.messages), *_responses_of(record, self.spec.responses).values()]
        size, most = sum(len(text.encode()) for text in texts), self._most_bytes
        if size > most:
            words = f"{size} bytes of text; --max_length {self.spec.max_length} holds {most} at the most"
            if self.spec.truncation_strategy == "raise":
                raise RecordTooLong(
                    f"Record {record.id} has {words}. Raise --max_length, or choose another --truncation_strategy."
                )
            raise RecordError("too long", words, field="messages")
        sizes = [image_size(content) for content in images]
        check_pixels(sizes, max_pixels=self.spec.max_pixels)
        for width, height in sizes:
            check_resized(self.processor, width, height)

    @property
    def _most_bytes(self) -> int:
        return self.spec.max_length * MAX_BYTES_PER_TOKEN

    def plain_row(self, record: PreferenceRecord, images: Sequence[bytes], side: str) -> dict[str, Tensor]:
        """A prompt and one of its responses as transformers documents a row: the processor's own output [1, ...] for the
        prompt, with the response behind it."""
        prompt, responses = self._render(record.messages, record)
        processed = self._processed(prompt, images)
        inputs = {name: torch.as_tensor(value) for name, value in processed.items() if name != "labels"}
        found = self._texts.responses(self._text_prompt(prompt), responses)
        response = torch.tensor([found[side].ids])
        length = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if name.endswith("_type_ids"):
                behind = int(self.spec.family.bidirectional == "prompt")
                inputs[name] = torch.nn.functional.pad(value, (0, response.shape[1]), value=behind)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response], dim=1)
        inputs["attention_mask"] = torch.ones(1, length + response.shape[1], dtype=torch.long)
        return inputs

    def prompt_with_marks(self, record: PreferenceRecord) -> list[int]:
        """The ids of a record's prompt with one image token for each image, as engines take them that expand it themselves;
        raises RecordError for a prompt that can't be written."""
        prompt, _ = self._render(record.messages, record)
        text = prompt if record.images else self._text_prompt(prompt)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self._texts.has_bos(text))["input_ids"]
        return self._texts.open_ended(ids)

    def _image_token(self) -> str | None:
        """What stands for an image in the text of a prompt."""
        if self.spec.family.text_only:
            return None
        return str(getattr(self.processor, "image_token", None) or self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def _render(self, messages: Sequence[Message], record: PreferenceRecord) -> tuple[str, dict[str, str]]:
        """The prompt's text up to where the model responds, and each response's text as the chat template ends it, by side."""
        for message in messages:
            self._refuse_special_tokens(message.content.replace(IMAGE_MARK, ""), "messages")
        prompt, responses = "", {}
        for side, response in _responses_of(record, self.spec.responses).items():
            self._refuse_special_tokens(response, side)
            prompt, responses[side] = self._written(messages, response, side)
        return prompt, responses

    def _written(self, messages: Sequence[Message], response: str, side: str) -> tuple[str, str]:
        """The prompt's text, and a response's with its end token."""
        rendered, eos = self.chat_template.render(messages, response, side=side), self.tokenizer.eos_token
        return rendered.prompt, rendered.response if eos in rendered.response else rendered.response.rstrip() + eos

    def _refuse_special_tokens(self, text: str, field: str) -> None:
        token = self._texts.special_token_in(text)
        if token is not None:
            raise RecordError(
                "special token in text",
                f"{token} is no text to this model: it marks a turn, an image or an end. Take it out of the text",
                field=field,
            )

    def _look_at(self, images: Sequence[bytes]) -> list[Picture]:
        """A record's images, decoded once. Raises RecordError for broken ones, and for those of a language model."""
        if not images:
            return []
        if self.spec.family.text_only:
            raise RecordError("images for a text model", f"{self.spec.model} is a language model", field="images")
        if self._by_shape is None:  # the processor decodes them
            return [Picture(content, None) for content in images]
        pictures = []
        for content in images:
            width, height = decoded_size(content, max_pixels=self.spec.max_pixels)
            pictures.append(Picture(content, (height, width)))
        return pictures

    @functools.cached_property
    def _by_shape(self) -> ShapeProcessor | None:
        """The processor for images of which only the size is known; None where there is no telling."""
        mark = self._image_token()
        return None if mark is None else shape_processor(self.processor, mark)

    def _ids(
        self, prompt: str, responses: Mapping[str, str], pictures: Sequence[Picture]
    ) -> tuple[list[int], dict[str, ResponseIds]]:
        """The ids of a rendered prompt, image tokens expanded, and of each response. Raises RecordError where the image tokens
        are not those of the images."""
        text = self._text_prompt(prompt)
        if pictures:
            prompt_ids, found = self._ids_with_images(prompt, pictures), self._texts.responses(text, responses)
        else:
            prompt_ids, found = self._texts.prompt_and_responses(text, responses)
            self._require_agreement(prompt_ids, (), num_images=0)
        for side, response in found.items():
            if self.image_token_id in response.ids:
                raise RecordError("image mark in response", "a response holds the image token", field=side)
        return prompt_ids, found

    def _ids_with_images(self, prompt: str, pictures: Sequence[Picture]) -> list[int]:
        if self._by_shape is not None:
            sizes = [picture.size for picture in pictures if picture.size is not None]
            inputs = self._by_shape(prompt, sizes, add_special_tokens=not self._texts.has_bos(prompt))
        else:
            inputs = self._processed(prompt, [picture.content for picture in pictures])
        lengths = describe_images(self.spec.family, self.spec.model_config, inputs).lengths
        ids = self._texts.open_ended(inputs["input_ids"][0].tolist())
        self._require_agreement(ids, lengths, num_images=len(pictures))
        return ids

    def _processed(self, prompt: str, images: Sequence[bytes]) -> Mapping[str, Any]:
        """The processor's output for a prompt, as arrays [1, ...]."""
        inputs: Mapping[str, Any]
        if images:
            opened = [open_image(content, max_pixels=self.spec.max_pixels) for content in images]
            special = not self._texts.has_bos(prompt)
            inputs = self.processor(text=[prompt], images=[opened], add_special_tokens=special, return_tensors="np")
        else:
            prompt = self._text_prompt(prompt)
            inputs = self.tokenizer([prompt], add_special_tokens=not self._texts.has_bos(prompt), return_tensors="np")
        shape = inputs["input_ids"].shape
        length = len(self._texts.open_ended(inputs["input_ids"][0].tolist()))
        return {name: value[:, :length] if value.shape == shape else value for name, value in inputs.items()}

    def _text_prompt(self, prompt: str) -> str:
        return self.spec.family.text_prompt(prompt, self.tokenizer)

    def _require_agreement(self, ids: list[int], lengths: Sequence[int], *, num_images: int) -> None:
        """Raises RecordError where not as many ids stand for images as the model makes features, if that can be told here."""
        if self.spec.family.image_token_counts is None:
            return
        found, expected = ids.count(self.image_token_id) if self.image_token_id is not None else 0, sum(lengths)
        if found != expected:
            raise RecordError(
                "image token mismatch",
                f"{found} image tokens in the prompt, but the model makes {expected} features of the {num_images} images; "
                "the processor's settings (patch_size, vision_feature_select_strategy) don't fit the model",
                field="images",
            )


def _text_of_template(spec: EncoderSpec) -> str:
    """The model's chat template, or its family's; of several, the default one. Raises ValueError where there is none."""
    template = spec.processor.chat_template or spec.tokenizer.chat_template or spec.family.chat_template
    if template is None:
        raise ValueError(
            f"The model {spec.model} has no chat template, so its prompts can't be written. It is probably a base model: "
            "take the instruction-tuned one, or put a chat_template.jinja into its folder."
        )
    if isinstance(template, Mapping) and "default" not in template:
        raise ValueError(
            f"The model {spec.model} has the chat templates {', '.join(sorted(template))}, and none called default. Put the "
            "one to train with into its folder as chat_template.jinja."
        )
    return str(template["default"] if isinstance(template, Mapping) else template)


def _responses_of(record: PreferenceRecord, responses: Responses) -> dict[str, str]:
    """The responses that a row holds, by side."""
    if record.rejected is None or responses == "chosen":
        is_bad = responses == "either" and record.label is False
        return {"rejected" if is_bad else "chosen": record.chosen}
    return {"chosen": record.chosen, "rejected": record.rejected}
