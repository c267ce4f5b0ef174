"""A run's flags as YAML: files that `--config` names -> flat values, and a Config -> the commented YAML that runs it again."""

import dataclasses
import re
import textwrap
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from rayalign.config.config import Config, section_types
from rayalign.config.flags import flags_of
from rayalign.config.inference_verbs import IterateConfig
from rayalign.config.plan import PlanConfig
from rayalign.config.plugins import PLUGIN
from rayalign.config.translate import translate_values
from rayalign.config.tune import TuneConfig

if TYPE_CHECKING:
    from rayalign.storage import Store

Extra = TuneConfig | PlanConfig | IterateConfig
"""The flags that some verbs have besides those of a run."""

RUN_CONFIG = "config.yaml"
"""The file in a run's folder that holds its flags."""

YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError)
"""What PyYAML raises for a text that is no YAML, or whose values are not of the type that their form or tag says."""

DECIMAL = {
    "tag:yaml.org,2002:int": re.compile("[-+]?(?:0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?$"),
}
"""The numbers that a file's plain words may be, which are numbers on the command line, too."""

TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """YAML without what only YAML 1.1 takes for numbers and dates, such as 2:4 (124), 010 (8) and 2024-01-01: it stays text, as
    it is on the command line."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, DECIMAL.get(tag, pattern)) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def to_yaml(config: Config, extra: Extra | None = None) -> str:
    """Every flag with its value, by section, each below its help; `--config` reads it back exactly."""
    values = {**config.to_dict(), **(dataclasses.asdict(extra) if extra else {})}
    lines = [
        "# All flags of a run: `--config` with this file runs it, flags beside it win over the file.",
        f"rlhf_type: {config.algorithm.name}",
    ]
    if config.plugins:
        lines.append(f"{PLUGIN}: {_yaml_value([plugin.argument for plugin in config.plugins])}")
    for section in (*section_types(type(config.algorithm)), *((type(extra),) if extra else ())):
        for index, flag in enumerate(flags_of(section)):
            lines += ["", f"## {flag.section}"] if index == 0 else []
            lines += textwrap.wrap(flag.full_help(), 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
            lines.append(f"{flag.name}: {_yaml_value(flag.convert(values[flag.name]))}")
    return "\n".join(lines) + "\n"


def read_files(locations: Iterable[str], own: Container[str]) -> dict[str, Any]:
    """The flags of YAML files, local or remote, under our names (those of `own` flags keep theirs); later files win.

    Raises ValueError for a file that can't be read, or that gives a flag twice.
    """
    values: dict[str, Any] = {}
    for location in locations:
        values |= translate_values(_read_file(location), own)
    return values


def plugins_in(locations: Iterable[str]) -> str | Sequence[str]:
    """What --plugin has in YAML files: the last one that says so."""
    named: list[str | Sequence[str]] = [found for file in locations if (found := _read_file(file).get(PLUGIN))]
    return named[-1] if named else ()


def _read_file(location: str) -> dict[str, Any]:
    from rayalign.downloads import read_file  # here, so that flags alone are read before a file system's library is loaded

    try:
        return parse_flags(read_file(location))
    except OSError as error:
        raise ValueError(f"--config {location}: can't be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise ValueError(f"--config {location}: {error}") from None


def parse_flags(content: bytes) -> dict[str, Any]:
    """The flags in the bytes of a YAML file; raises ValueError that says what is wrong with the file, without its name."""
    try:
        text = content.decode()
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("is nested too deep.") from None
    except YAML_ERRORS as error:
        raise ValueError(f"is not YAML ({error}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ValueError("must hold lines of `flag: value`.")
    keys = [key.value for key, _ in root.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given more than once.")
    return {str(key): value for key, value in values.items()}


def flags_of_run(folder: "Store") -> dict[str, Any]:
    """The flags of the run whose folder it is, as its config.yaml has them; empty where it is no run's. Raises ValueError for a
    file of this name that can't be read."""
    file = folder / RUN_CONFIG
    try:
        flags = parse_flags(file.read_bytes())
    except OSError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{file.location}: {error} It stands where a run has its flags: mend it, or put the model into another folder."
        ) from None
    return flags if "rlhf_type" in flags else {}


def _yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]
