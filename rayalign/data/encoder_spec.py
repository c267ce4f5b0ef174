"""Everything that the encoding of records depends on besides the records: which model, what its rows hold, and their limits.

`encode` makes rows by it, `prepare` keys the cache of encoded data by its fingerprint, and `stream` decodes images as it says.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from rayalign.data.truncation import TruncationStrategy
from rayalign.formats.records import Responses
from rayalign.images.fetch import open_image
from rayalign.models.chat_templates import packaged_template
from rayalign.models.family import Family, ImageInputs, RowLayout
from rayalign.models.processor_files import TEMPLATE_FILE, brings_template, processor_files
from rayalign.models.registry import FAMILIES, find_family, load_config

if TYPE_CHECKING:
    from rayalign.data.batch import ImageChange, ImageProcessing


@dataclass(frozen=True)
class EncoderSpec:
    """Everything the encoding depends on besides the record; `fingerprint` keys the cache of encoded data.

    `model` is a folder or hub id with processor and config. Rows hold the chosen response, both, or either (a pair's both, or
    the one response of a labelled record: chosen where it is good, else rejected).
    """

    model: str
    responses: Responses
    max_length: int = 4096
    truncation_strategy: TruncationStrategy = "delete"
    max_pixels: int | None = None
    trust_remote_code: bool = False

    @property
    def processor(self) -> Any:
        return self._loaded[0]

    @property
    def lent_template(self) -> str | None:
        """The name of the chat template that TRL lends, where neither the model's files nor its family have one."""
        return None if self.family.chat_template or brings_template(self._files) else self._loaded[1]

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return processor_files(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _loaded(self) -> tuple[Any, str | None]:
        from rayalign.models.processors import load_processor, tokenizer_of  # here: a driver needs the files only

        processor = load_processor(self.model, trust_remote_code=self.trust_remote_code)
        tokenizer = tokenizer_of(processor)
        lent = None
        if not (processor.chat_template or tokenizer.chat_template or self.family.chat_template):
            lent = packaged_template(tokenizer, self.model_config)
        if lent is None:
            return processor, None
        processor.chat_template = lent.text
        return processor, lent.name

    @cached_property
    def tokenizer(self) -> Any:
        from rayalign.models.processors import tokenizer_of

        return tokenizer_of(self.processor)

    @cached_property
    def model_config(self) -> Any:
        return load_config(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def family(self) -> Family:
        return find_family(self.model_config.model_type)

    @cached_property
    def layout(self) -> RowLayout:
        """How the rows of this model's batches are laid out. Raises ValueError for a model with images but without an image
        token."""
        image_token_id = self.model_config.to_dict().get("image_token_id", self.model_config.to_dict().get("image_token_index"))
        if image_token_id is None and not self.family.text_only:
            raise ValueError(
                f"The model {self.model} (type {self.family.model_type!r}) has no token that stands for an image, so that its "
                f"images can't be placed. Supported for certain: {', '.join(sorted(FAMILIES))}."
            )
        pad = self.tokenizer.pad_token_id
        return RowLayout(
            pad_token_id=pad if pad is not None else self.tokenizer.eos_token_id,
            image_token_id=image_token_id,
            first_position=self.family.first_position,
            features_by_company=self.family.features_by_company,
        )

    def fingerprint(self) -> str:
        """Hex digest of the processor's files (tokenizer, chat template, image settings), the model's config and the
        settings."""
        digest = hashlib.sha256()
        files = self._files | ({TEMPLATE_FILE: self.processor.chat_template.encode()} if self.lent_template else {})
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + content)
        config = {
            k: v for k, v in self.model_config.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")
        }
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "model"}
        settings["chat_template"] = self.family.chat_template
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def image_processing(spec: EncoderSpec) -> "ImageProcessing":
    """The function that turns images' bytes into the model's image inputs, as the encoder saw them."""
    from rayalign.models.processors import process_images

    def process(contents: Sequence[bytes], alone: Sequence[bool], change: "ImageChange | None" = None) -> ImageInputs:
        opened: Sequence[Image] = [open_image(content, max_pixels=spec.max_pixels) for content in contents]
        opened = opened if change is None else change(opened)
        return process_images(spec.processor, spec.family, spec.model_config, opened, alone=alone)

    return process
