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
    for flag_words in _by_flag(words):
        if not flag_words[0].startswith("--"):
            translated += flag_words
            continue
        written, equals, value = flag_words[0][2:].partition("=")
        name = _normalised(written)
        alias = alias_of(name, own)
        flag = alias.flag if alias else name
        if given.get(flag) != written:
            _refuse_twice(given, flag, written)
        values = [value] if equals else flag_words[1:]
        bare = ["true"] if alias and "true" in alias.values else []  # --bf16 alone
        if alias is None:
            translated += [f"--{flag}={value}"] if equals else [f"--{flag}", *values]
        else:
            translated += [f"--{flag}", *map(str, alias.convert(values or bare))]
    return translated


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
