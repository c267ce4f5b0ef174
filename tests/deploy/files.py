"""What the tests of the ways onto a cluster read and compare: the repository's files, commands, and what `ray start` takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from ray.scripts.scripts import start

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.config import Config

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


def read_yaml(path: str) -> Any:
    return yaml.safe_load((REPOSITORY / path).read_text())


def locked_version(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert found
    return found[1]


def rayalign_commands(text: str) -> list[list[str]]:
    """The words behind each `rayalign` of a shell text, comments and line ends taken out."""
    plain = re.sub(r"\\\n|\n(?=\s+--)", " ", re.sub(r"^# ?", "", text, flags=re.MULTILINE))
    return [
        shlex.split(re.sub(r"[)].*", "", words)) for words in re.findall(r"\brayalign ((?:sft|dpo) .*)$", plain, re.MULTILINE)
    ]


def config_of(words: list[str]) -> Config:
    """The configuration that the command makes; raises SystemExit for a flag that there is not."""
    verb, *flags = words
    return command_line.parse(ALGORITHMS, flags, algorithm=verb, prog="rayalign", description="")


def check_ray_start(words: list[str]) -> dict[str, Any]:
    """What `ray start` reads from the words; raises click.UsageError for an option that it has not."""
    return start.make_context("start", list(words)).params
