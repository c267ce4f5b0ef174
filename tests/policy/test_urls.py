"""A model of a URL: the same tensors and encoding as in a folder, and no path of this machine's copy in what is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayalign.algorithms import DPO, SFT
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.reference.key import reference_key
from tests.tiny_models import make_policy


@pytest.fixture
def remote(model_folder: Callable[..., Path], bucket: Path) -> Path:
    """The local model that `s3://bucket/llava` holds."""
    folder = model_folder("llava")
    (bucket / "llava").symlink_to(folder)
    return folder


def test_a_remote_model_is_encoded_for_as_the_same_one_in_a_folder(remote: Path) -> None:
    local, there = EncoderSpec(str(remote), "both"), EncoderSpec("s3://bucket/llava", "both")
    assert there.fingerprint() == local.fingerprint()


@pytest.mark.parametrize("sft_type", ["lora", "full"])
def test_nothing_that_is_saved_names_this_machines_copy(remote: Path, tmp_path: Path, sft_type: str) -> None:
    tuner = TunerConfig(sft_type=sft_type)  # type: ignore[arg-type]
    for name, base in (("of_url", "s3://bucket/llava"), ("of_folder", str(remote))):
        needs = DPO().needs if sft_type == "lora" else SFT().needs
        save_policy(make_policy(ModelSource(base), tuner=tuner, needs=needs), tmp_path / name)
        EncoderSpec(base, "both").processor.save_pretrained(tmp_path / name)
    of_url = {str(file.relative_to(tmp_path / "of_url")): file.read_bytes() for file in (tmp_path / "of_url").rglob("*.*")}
    assert not [name for name, content in of_url.items() if str(tmp_path / "downloads").encode() in content]
    for name, content in of_url.items():
        same = (tmp_path / "of_folder" / name).read_bytes().replace(str(remote).encode(), b"s3://bucket/llava")
        assert content == same, name
    assert len(of_url) > 4


def test_an_adapter_of_a_url_is_continued_from(remote: Path, bucket: Path) -> None:
    first = make_policy(ModelSource("s3://bucket/llava"), tuner=TunerConfig(lora_rank=2))
    for value in first.trainable.values():
        torch.nn.init.normal_(value)
    save_policy(first, bucket / "adapter")
    continued = make_policy(ModelSource("s3://bucket/llava", "s3://bucket/adapter"))
    assert continued.trainable.keys() == first.trainable.keys()
    assert all(torch.equal(value, first.trainable[name]) for name, value in continued.trainable.items())


def test_the_key_of_a_remote_reference_is_its_url_and_listing(remote: Path, reads: list[str], tmp_path: Path) -> None:
    def key() -> str:
        source = ModelSource("s3://bucket/llava")
        flags = {"model": ModelConfig(), "tuner": TunerConfig(), "dtype": "float32", "device": "cpu", "companion": None}
        found = reference_key(source, **flags)  # type: ignore[arg-type]
        assert {name.rpartition("/")[0] for name in found.weights} == {"s3://bucket/llava"}
        return found.folder_name

    before = key()
    assert before == key()
    assert reads == []
    (remote / "config.json").touch()
    assert before != key()
