"""What a flag is: a dataclass field with help, type and bounds. pydantic checks the last two, here in the words of the user.

`sections` and the algorithms declare their flags with it; the command line, YAML files and sweeps read them.
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

import pydantic

NUMBER_OR_RANGE = int | str
"""The type of a flag that takes a whole number, or two as MIN:MAX."""

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most"}
"""Bounds of a number as pydantic and as we call them."""


class Section(Protocol):
    """Flags that belong together: a frozen dataclass whose fields are declared with `flag`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


AnySection = TypeVar("AnySection", bound=Section)


def flag(
    default: Any, help: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """Declares a flag: a dataclass field with its help and the bounds its value must keep."""
    bounds = {"ge": at_least, "gt": above, "le": at_most}
    limits = {name: limit for name, limit in bounds.items() if limit is not None}
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


def same_flag(section: type[Section], name: str) -> Any:
    """Declares the flag that another section has by this name: its default, help and bounds are written there."""
    field = section.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def check_bounds(section: Section) -> None:
    """Raises ValueError naming the flag whose value is not of its type, or lies outside its bounds."""
    for flag in flags_of(type(section)):
        flag.check(getattr(section, flag.name))


@dataclass(frozen=True)
class Flag:
    """A flag as the command line and the docs see it; `limits` are its bounds, by pydantic's names."""

    name: str
    type: Any
    default: Any
    help: str
    section: str
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
    def is_switch(self) -> bool:
        """Whether the flag takes true and false, alone or beside other words."""
        return self.item_type is bool or bool in get_args(self.item_type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the flag takes; empty where any will do, and for true and false alone."""
        options = (self.item_type,) if get_origin(self.item_type) is Literal else get_args(self.item_type)
        return tuple(word for option in options for word in (("true", "false") if option is bool else get_args(option)))

    @property
    def bounds(self) -> str:
        """The bounds in words; empty where there are none."""
        return ", ".join(f"{BOUNDS[name]} {limit:.10g}" for name, limit in self.limits.items())

    @property
    def expected(self) -> str:
        """What the flag takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        words[NUMBER_OR_RANGE] = "a whole number, or two as MIN:MAX"
        return words[self.item_type] + (" or none" if self.is_optional else "")

    def full_help(self, *, with_choices: bool = True) -> str:
        """The help with what the flag takes and its default; a default of none is told by the help itself."""
        default = self.default
        if self.is_list:
            default = " ".join(map(str, default))
        elif isinstance(default, bool):
            default = str(default).lower()
        facts = [self.expected] if with_choices and self.choices else []
        facts += [self.bounds] if self.bounds else []
        facts += [] if default in (None, "") else [f"default: {default}"]
        return f"{self.help} ({'; '.join(facts)})" if facts else self.help

    def check(self, value: Any) -> None:
        """Raises ValueError unless the value is one that the flag can have."""
        if value is None and self.is_optional:
            return
        if self.is_list and not isinstance(value, tuple):
            raise ValueError(f"--{self.name} {value}: must be a tuple, each {self.expected}.")
        for item in value if self.is_list else (value,):
            self._validate(item, strict=True)

    def convert(self, value: Any) -> Any:
        """The flag's value from a word, a list of words or a typed value; raises ValueError that says what the flag takes."""
        if self.is_optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        if not self.is_list:
            return self._validate(value, strict=False)
        items = value if isinstance(value, (list, tuple)) else (value,)
        if self.item_type is not str:  # numbers and choices hold no commas, paths and expressions may
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else (item,))]
        return tuple(self._validate(item, strict=False) for item in items)

    @functools.cached_property
    def _adapter(self) -> pydantic.TypeAdapter[Any]:
        """What checks one value of the flag."""
        limits = pydantic.Field(ge=self.limits.get("ge"), gt=self.limits.get("gt"), le=self.limits.get("le"))
        bounded: Any = Annotated[self.item_type, limits]
        if self.item_type == NUMBER_OR_RANGE:
            bounded = Annotated[NUMBER_OR_RANGE, pydantic.Field(union_mode="left_to_right")]  # the word 2 is a number
        return pydantic.TypeAdapter(bounded, config=pydantic.ConfigDict(allow_inf_nan=False))

    def _validate(self, value: Any, *, strict: bool) -> Any:
        try:
            # To pydantic true is 1 where words are read.
            return self._adapter.validate_python(value, strict=strict or isinstance(value, bool))
        except pydantic.ValidationError as error:
            broken = {name: limit for name, limit in error.errors()[0].get("ctx", {}).items() if name in BOUNDS}
        for name, limit in broken.items():
            raise ValueError(f"--{self.name} {self.item_type(value)}: must be {BOUNDS[name]} {limit:.10g}.")
        raise ValueError(f"--{self.name} {value}: must be {self.expected}.{did_you_mean(str(value), self.choices)}")


def flags_of(section: type[Section]) -> tuple[Flag, ...]:
    """The flags of a section class or algorithm class, in order."""
    return _flags_of(cast(Hashable, section))


@functools.cache
def _flags_of(section: Any) -> tuple[Flag, ...]:
    types = get_type_hints(section)
    title = (section.__doc__ or section.__name__).strip().splitlines()[0]
    return tuple(
        Flag(field.name, types[field.name], field.default, field.metadata["help"], title, field.metadata["limits"])
        for field in dataclasses.fields(section)
    )


def section_from_mapping(section: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """Builds one section from those of the flat values that are its flags."""
    return section(**{flag.name: flag.convert(values[flag.name]) for flag in flags_of(section) if flag.name in values})


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """' Did you mean X?' with the known word that a mistyped one is meant to be; empty where none is near."""
    near = nearest(word, known)
    return f" Did you mean {prefix}{near}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The only known word that another one begins, or the one that it misses by few slips of the hand: one in four letters."""
    typed = word.replace("-", "_").strip("'\"[]()., ").lower()
    names = list(known)
    begun = [name for name in names if len(typed) >= 3 and name.startswith(typed)]
    if len(begun) == 1:
        return begun[0]
    distance, closest = min(((_slips(typed, name), name) for name in names), default=(len(typed), ""))
    return closest if distance <= max(1, len(typed) // 4) and distance < len(typed) else None


def _slips(typed: str, meant: str) -> int:
    """Letters added, left out, changed or swapped with their neighbour (optimal string alignment)."""
    above, row = [0] * (len(meant) + 1), list(range(len(meant) + 1))
    for i, letter in enumerate(typed):
        two_above, above, row = above, row, [i + 1]
        for j, other in enumerate(meant):
            best = min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1)
            if i and j and letter == meant[j - 1] and typed[i - 1] == other:
                best = min(best, two_above[j - 1] + 1)
            row.append(best)
    return row[-1]
