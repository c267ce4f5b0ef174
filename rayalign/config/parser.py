"""Flags for argparse: their values' names and their help, and a parser whose errors are a sentence.

`command_line` reads words with it.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from rayalign.config.flags import NUMBER_OR_RANGE, Flag, Section, flags_of
from rayalign.config.plugins import PLUGIN

LONGEST_METAVAR = 80


class Parser(argparse.ArgumentParser):
    """Argparse without abbreviations, whose errors are a sentence and not a page of usage."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message}\n(--help lists every flag)\n")
        raise SystemExit(2)


class _Once(argparse.Action):
    """Stores the value of a flag that takes one; refuses a second value, for one of the two would be lost."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if before is not None:
            parser.error(f"--{self.dest} is given more than once, as {before} and as {values}: give it once.")
        setattr(namespace, self.dest, values)


def started_as(prog: str) -> str:
    """How a program is started: `python pipelines/dpo.py`, or the command `rayalign dpo`."""
    return f"python {prog}" if prog.endswith(".py") else prog


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """A parser without flags; `epilog` ends its help."""
    width = min(shutil.get_terminal_size().columns - 2, 98)
    return Parser(
        prog=prog,
        usage=f"{started_as(prog)} [--flag value ...] [--config FILE ...]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width),
    )


def add_section(parser: argparse.ArgumentParser, section: type[Section]) -> None:
    """The flags of a section, as a group of the help."""
    flags = list(flags_of(section))
    group = parser.add_argument_group(flags[0].section) if flags else None
    for flag in flags:
        _add_flag(group, flag)


def add_steering_flags(parser: argparse.ArgumentParser, algorithms: Iterable[str]) -> None:
    """The flags that say where the others come from."""
    parser.add_argument(
        "--rlhf_type",
        default=None,
        action=_Once,
        metavar="|".join(algorithms),
        help="What is trained; decides which flags there are.",
    )
    add_config_flag(parser)
    parser.add_argument(
        f"--{PLUGIN}",
        default=[],
        nargs="+",
        action="extend",
        metavar="MODULE",
        help="Algorithms and record formats of your own: modules (my_module), or files (my_loss.py) whose text goes to all "
        "workers. Their algorithms stand beside those of --rlhf_type, with their flags.",
    )
    parser.add_argument(
        "--print_config", default=False, action="store_true", help="Print all flags with their values as YAML and stop."
    )


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that names YAML files."""
    parser.add_argument(
        "--config",
        default=[],
        nargs="+",
        action="extend",
        metavar="FILE",
        help="YAML files of flags (flag: value). A later file wins over an earlier one, and flags win over files.",
    )


def _add_flag(group: Any, flag: Flag) -> None:
    metavars = {int: "N", float: "X", bool: "true|false", str: "TEXT", NUMBER_OR_RANGE: "N|MIN:MAX"}
    choices = "|".join(flag.choices)
    too_long = len(choices) > LONGEST_METAVAR
    metavar = "NAME" if too_long else choices or metavars[flag.item_type]
    help_text = flag.full_help(with_choices=too_long).replace("%", "%%")
    if flag.is_list:
        group.add_argument(f"--{flag.name}", nargs="+", action="extend", metavar=metavar, help=help_text)
    elif flag.is_switch:
        group.add_argument(f"--{flag.name}", nargs="?", const="true", action=_Once, metavar=metavar, help=help_text)
    else:
        group.add_argument(f"--{flag.name}", action=_Once, metavar=metavar, help=help_text)
