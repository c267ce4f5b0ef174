"""What a flag is: a dataclass field with help and bounds, and how a word, a YAML scalar or a Tune sample becomes its value.

`config` and the algorithms declare their flags with it; `cli` and `search` read them.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic


def flag(
    default: Any, help: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """Declares a flag: a dataclass field with its help and the bounds its value must keep."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def check_bounds(section: Any) -> None:
    """Raises ValueError naming the flag whose value lies outside the bounds declared with `flag`."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is None or isinstance(number, (str, bool)):
                continue
            at_least, above, at_most = (field.metadata.get(k) for k in ("at_least", "above", "at_most"))
            if at_least is not None and number < at_least:
                raise ValueError(f"--{field.name} {number}: must be at least {at_least:.10g}.")
            if above is not None and number <= above:
                raise ValueError(f"--{field.name} {number}: must be above {above:.10g}.")
            if at_most is not None and number > at_most:
                raise ValueError(f"--{field.name} {number}: must be at most {at_most:.10g}.")


@dataclass(frozen=True)
class Flag:
    """A flag as the command line and the docs see it; `bounds` in words, empty where there are none."""

    name: str
    type: Any
    default: Any
    help: str
    section: str
    bounds: str = ""

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def item_type(self) -> Any:
        """The type of one value: without `None`, and the elements' type of a list."""
        options = [option for option in get_args(self.type) if option is not NoneType]
        return options[0] if self.is_list or self.is_optional else self.type

    @property
    def is_optional(self) -> bool:
        return NoneType in get_args(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the flag takes; empty where any will do."""
        return get_args(self.item_type) if get_origin(self.item_type) is Literal else ()

    @property
    def expected(self) -> str:
        """What the flag takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return words[self.item_type] + (" or none" if self.is_optional else "")

    def full_help(self, *, with_choices: bool = True) -> str:
        """The help with what the flag takes and its default; a default of none is told by the help itself."""
        default = (
            " ".join(map(str, self.default))
            if self.is_list
            else str(self.default).lower()
            if self.item_type is bool
            else self.default
        )
        facts = [self.expected] if with_choices and self.choices else []
        facts += [self.bounds] if self.bounds else []
        facts += [] if default in (None, "") else [f"default: {default}"]
        return f"{self.help} ({'; '.join(facts)})" if facts else self.help


def flags_of(section: Any) -> Iterator[Flag]:
    """The flags of a section class or algorithm class, in order."""
    types = get_type_hints(section)
    title = (section.__doc__ or section.__name__).strip().splitlines()[0]
    for field in dataclasses.fields(section):
        words = {"at_least": "at least", "above": "above", "at_most": "at most"}
        limits = [f"{words[k]} {field.metadata[k]:.10g}" for k in words if field.metadata[k] is not None]
        yield Flag(field.name, types[field.name], field.default, field.metadata["help"], title, ", ".join(limits))


def section_from_mapping(section: type[Any], values: Mapping[str, Any]) -> Any:
    """Builds one section from those of the flat values that are its flags."""
    return section(**{flag.name: convert(flag, values[flag.name]) for flag in flags_of(section) if flag.name in values})


def convert(flag: Flag, value: Any) -> Any:
    """The value of a flag from a word, a list of words or a typed value; raises ValueError that says what the flag takes."""
    if flag.is_optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if flag.is_list:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if flag.item_type is not str:  # numbers and choices hold no commas, paths and expressions may
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else (item,))]
        return tuple(_convert_item(flag, item) for item in items)
    return _convert_item(flag, value)


def _convert_item(flag: Flag, value: Any) -> Any:
    adapter = pydantic.TypeAdapter(flag.item_type, config=pydantic.ConfigDict(allow_inf_nan=False))
    try:
        if isinstance(value, bool) and flag.item_type is not bool:
            raise ValueError
        return adapter.validate_python(value)
    except ValueError:  # pydantic's ValidationError is one
        choices = did_you_mean(str(value), flag.choices)
        raise ValueError(f"--{flag.name} {value}: must be {flag.expected}.{choices}") from None


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """' Did you mean X?' with the known word nearest to a mistyped one; empty where none is near."""
    near = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
