"""From the names and words of other tools (`aliases`) to ours, on a command line and in a file; hyphens become underscores."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from rayalign.config.aliases import alias_of


def translate_values(values: Mapping[str, Any], own: Container[str]) -> dict[str, Any]:
    """Flat values, as a file has them, under our names; those of `own` flags keep theirs, and so does what is no alias.

    Raises ValueError where two names are the same flag, or where an alias's value has no equal here.
    """
    translated: dict[str, Any] = {}
    given: dict[str, str] = {}
    for written, value in values.items():
        name = _normalised(written)
        alias = alias_of(name, own)
        flag = alias.flag if alias else name
        _refuse_twice(given, flag, written)
        translated[flag] = alias.convert(value) if alias else value
    return translated


def translate_words(words: Sequence[str], own: Container[str]) -> list[str]:
    """The words of a command line under our names; raises ValueError as `translate_values`."""
    translated: list[str] = []
    given: dict[str, str] = {}
    for first, *values in _by_flag(separate(words)):
        if not first.startswith("--"):
            translated += [first, *values]
            continue
        written, equals, value = first[2:].partition("=")
        name = _normalised(written)
        alias = alias_of(name, own)
        flag = alias.flag if alias else name
        if given.get(flag) != written:  # argparse knows which flags may be repeated
            _refuse_twice(given, flag, written)
        if alias is not None:
            given_values = [value, *values] if equals else values
            translated += [f"--{flag}", *map(str, alias.convert(given_values or alias.bare))]
        else:
            translated += [f"--{flag}{equals}{value}", *values]
    return translated


def separate(words: Sequence[str]) -> list[str]:
    """`--flag=value` as two words, so that more may follow where the flag takes a list, and are refused where it doesn't.
    A value that begins with a hyphen stays: alone it would be no value."""
    separated: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        is_separable = word.startswith("--") and equals and not value.startswith("-")
        separated += [flag, value] if is_separable else [word]
    return separated


def _normalised(name: str) -> str:
    """A flag's name with underscores, as it is declared; hyphens are as good."""
    return name.replace("-", "_")


def _refuse_twice(given: dict[str, str], flag: str, written: str) -> None:
    if flag in given:
        raise ValueError(f"--{given[flag]} and --{written} are one flag here, --{flag}: give it once.")
    given[flag] = written


def _by_flag(words: Sequence[str]) -> Iterable[list[str]]:
    """Each flag with the words up to the next one."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group
