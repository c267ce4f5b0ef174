"""The files that a model's processor is made of, read without loading it, which takes seconds."""

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rayalign.downloads import model_folder

TEMPLATE_FILE = "chat_template.jinja"

_NAMES = re.compile(
    r"(tokenizer|chat_template|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece).*|.*processor.*"
    r"|.*\.(jinja|model|tiktoken|bpe|py)"
)


def processor_files(model: str, *, trust_remote_code: bool = False) -> dict[str, bytes]:
    """The contents by name, of a folder or URL; of a hub id, what its processor would save."""
    folder = Path(model_folder(model, weights=False))
    if folder.is_dir():
        return _files_in(folder)
    from rayalign.models.processors import load_processor

    with tempfile.TemporaryDirectory() as saved:
        load_processor(model, trust_remote_code=trust_remote_code).save_pretrained(saved)
        return _files_in(Path(saved))


def _files_in(folder: Path) -> dict[str, bytes]:
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return {file.name: file.read_bytes() for file in found if _NAMES.fullmatch(file.name) and file.is_file()}


def brings_template(files: Mapping[str, bytes]) -> bool:
    """Whether there is a chat template among a processor's files, by itself or in its settings."""
    for name, content in files.items():
        if name.endswith(".jinja") or name.startswith("chat_template"):
            return True
        if name.endswith(".json") and b'"chat_template"' in content:
            with contextlib.suppress(ValueError):  # broken JSON: loading says so
                settings = json.loads(content)
                if isinstance(settings, dict) and settings.get("chat_template"):
                    return True
    return False
