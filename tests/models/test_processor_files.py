"""A processor's files tell one from another, and whether it brings a chat template, before it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.models.processor_files import brings_template, processor_files


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llama"])
def test_the_files_are_those_of_the_processor_and_not_of_the_model(model_folder: Callable[[str], Path], family: str) -> None:
    names = set(processor_files(str(model_folder(family))))
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert ("processor_config.json" in names) is (family != "llama")
    assert not {"config.json", "generation_config.json", "model.safetensors"} & names


def test_files_of_subfolders_but_those_of_templates_are_others(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "checkpoint-1/tokenizer.json", "additional_chat_templates/tools.jinja", "trainer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert processor_files(str(tmp_path)) == {"tokenizer.json": b"{}", "tools.jinja": b"{}"}


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("chat_template.jinja", b"{{ messages }}", True),
        ("chat_template.json", b"{}", True),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"}).encode(), True),
        ("processor_config.json", json.dumps({"chat_template": {"default": "{{ messages }}"}}).encode(), True),
        ("tokenizer_config.json", json.dumps({"chat_template": None}).encode(), False),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"chat_template": 7}}}).encode(), False),
        ("vocab.json", b'["chat_template"]', False),
        ("tokenizer_config.json", b'{"chat_template": ', False),
        ("merges.txt", b'"chat_template"', False),
    ],
)
def test_a_template_is_found_in_a_file_of_its_own_or_in_settings(name: str, content: bytes, found: bool) -> None:
    assert brings_template({name: content}) is found
