"""Words of the command line, with the YAML files that they name -> a Config.

The flags, their help and their checks are in `sections` and the algorithms, the files are read by `yaml_files`; a mistake ends
the program with exit code 2 and a sentence on stderr.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rayalign.config.aliases import ALIASES, advice_for
from rayalign.config.config import Config, config_from_mapping, section_types
from rayalign.config.flags import AnySection, Flag, Section, did_you_mean, flags_of, nearest, section_from_mapping
from rayalign.config.inference_verbs import IterateConfig
from rayalign.config.methods import advice_for_method
from rayalign.config.parser import Parser, add_config_flag, add_section, add_steering_flags, new_parser, started_as
from rayalign.config.plan import PlanConfig
from rayalign.config.plugins import PLUGIN, Plugin, load_plugins
from rayalign.config.translate import separate, translate_values, translate_words
from rayalign.config.tune import TuneConfig
from rayalign.config.yaml_files import Extra, plugins_in, read_files, to_yaml

if TYPE_CHECKING:
    from rayalign.algorithms import Algorithm

OtherSection = TypeVar("OtherSection", bound=Section)

DEFAULT_ALGORITHM = "dpo"
STEERING = ("config", "print_config")
"""What only a command line has."""


def parse(
    algorithms: "Mapping[str, type[Algorithm]]",
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    algorithm: str | None = None,
) -> Config:
    """The run that words and the YAML files named by them describe; a mistake ends the program with code 2.

    `algorithm` fixes what is trained; None leaves it to `--rlhf_type`.
    """
    return _Command(algorithms, prog, description, algorithm).read(words)[0]


def parse_sweep(
    algorithms: "Mapping[str, type[Algorithm]]",
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    check: Callable[[Config, TuneConfig], object],
) -> tuple[Config, TuneConfig]:
    """The run that every trial of a sweep starts from, and what the sweep searches; a mistake ends the program with code 2.

    `check` raises ValueError for a search that the run's flags don't allow.
    """
    config, tune = _Command(algorithms, prog, description, None, TuneConfig, check).read(words)
    assert isinstance(tune, TuneConfig)
    return config, tune


def parse_plan(
    algorithms: "Mapping[str, type[Algorithm]]", words: Sequence[str], *, prog: str, description: str
) -> tuple[Config, PlanConfig]:
    """The run that is planned, and the GPUs it is planned for; a mistake ends the program with code 2."""
    config, plan = _Command(algorithms, prog, description, None, PlanConfig).read(words)
    assert isinstance(plan, PlanConfig)
    return config, plan


def parse_rounds(
    algorithms: "Mapping[str, type[Algorithm]]", words: Sequence[str], *, prog: str, description: str
) -> tuple[Config, IterateConfig]:
    """The training of each round, and how rounds are made; a mistake ends the program with code 2."""
    config, rounds = _Command(algorithms, prog, description, None, IterateConfig).read(words)
    assert isinstance(rounds, IterateConfig)
    return config, rounds


def parse_section(section: type[AnySection], words: Sequence[str], *, prog: str, description: str, example: str) -> AnySection:
    """The flags of a program that trains nothing, from words and YAML files; a mistake ends the program with code 2."""
    (parsed,) = _parse_sections((section,), words, prog=prog, description=description, example=example)
    return cast(AnySection, parsed)


def parse_sections(
    sections: tuple[type[AnySection], type[OtherSection]],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    example: str,
) -> tuple[AnySection, OtherSection]:
    """The same of flags in two sections, neither of which has a flag of the other."""
    first, second = _parse_sections(sections, words, prog=prog, description=description, example=example)
    return cast(AnySection, first), cast(OtherSection, second)


def _parse_sections(
    sections: Sequence[type[Section]], words: Sequence[str], *, prog: str, description: str, example: str
) -> tuple[Section, ...]:
    parser = new_parser(prog, description, f"example:\n  {started_as(prog)} {example}")
    add_config_flag(parser)
    for section in sections:
        add_section(parser, section)
    known = [flag.name for section in sections for flag in flags_of(section)]
    try:
        given, rest = parser.parse_known_args(translate_words(words, (*known, "config")))
        from_files = read_files(given.config, known)
        from_words = {key: value for key, value in vars(given).items() if key in known}
        unknown = _unknown_names(from_files, known, rest)
        problems = [_unknown_flag(name, (*known, "config")) for name in unknown]
        if not problems and rest:
            problems = [_unexpected_word(rest[0])]
        if problems:
            raise ValueError("\n".join(problems))
        return tuple(section_from_mapping(section, from_files | from_words) for section in sections)
    except ValueError as error:
        parser.error(str(error))


def build_sections(
    sections: tuple[type[AnySection], type[OtherSection]], values: Mapping[str, Any], *, files: Sequence[str] = ()
) -> tuple[AnySection, OtherSection]:
    """What `parse_sections` reads, from flags given as values on top of YAML files. Raises ValueError."""
    first, second = sections
    known = [flag.name for section in sections for flag in flags_of(section)]
    merged = {**read_files(files, known), **translate_values(values, known)}
    problems = [_unknown_flag(name, known) for name in merged if name not in known]
    if problems:
        raise ValueError("\n".join(problems))
    return section_from_mapping(first, merged), section_from_mapping(second, merged)


def build(
    algorithms: "Mapping[str, type[Algorithm]]",
    name: str,
    values: Mapping[str, Any],
    *,
    files: Sequence[str] = (),
    extra: type[Extra] | None = None,
) -> tuple[Config, Extra | None]:
    """The run that flags given as values describe, on top of YAML files, with the sentences of the command line.

    `name` is the algorithm. Raises ValueError for what the command line would refuse.
    """
    command = _Command(algorithms, "rayalign", "", None, extra)._with_plugins(values.get(PLUGIN) or plugins_in(files))
    own = command._own_names()
    from_files = read_files(files, own)
    named_in_file = from_files.pop("rlhf_type", name)
    if named_in_file != name:
        raise ValueError(
            f"The algorithm is {name}, and the files {', '.join(files)} hold rlhf_type: {named_in_file}. Give one of them."
        )
    merged = {**from_files, **translate_values(values, own)}
    merged.pop(PLUGIN, None)
    command._refuse_unknown(command._algorithm_name(name), merged, ())
    return command._build(name, merged, print_config=False)


@dataclass(frozen=True)
class _Command:
    """A pipeline's command line: which algorithms it offers, which one it is fixed to, and the section of flags that it has
    besides a run's."""

    algorithms: "Mapping[str, type[Algorithm]]"
    prog: str
    description: str
    algorithm: str | None
    extra: type[Extra] | None = None
    check: Callable[[Config, Any], object] | None = None
    plugins: tuple[Plugin, ...] = ()

    def read(self, words: Sequence[str]) -> tuple[Config, Extra | None]:
        first = Parser(prog=self.prog, add_help=False, allow_abbrev=False)
        add_steering_flags(first, self.algorithms)
        try:
            early, _ = first.parse_known_args(separate(words))  # a plugin's flags are known once it is loaded
            command = self._with_plugins(early.plugin or plugins_in(early.config))
            own = command._own_names()
            words = translate_words(words, own)
            steering, _ = first.parse_known_args(words)
            from_files = read_files(steering.config, own)
            named_in_file = from_files.pop("rlhf_type", None)
            from_files.pop(PLUGIN, None)
            name = command._algorithm_name(steering.rlhf_type or named_in_file)
            parser = command._parser(name)
            given, rest = parser.parse_known_args(words)
            from_words = {key: value for key, value in vars(given).items() if key in command._flags(name)}
            command._refuse_unknown(name, from_files, rest)
            return command._build(name, {**from_files, **from_words}, print_config=given.print_config)
        except ValueError as error:
            first.error(str(error))

    def _with_plugins(self, arguments: str | Sequence[str] | None) -> "_Command":
        """The same command line with the algorithms of plugins beside its own."""
        plugins = load_plugins([arguments] if isinstance(arguments, str) else list(arguments or ()), self.algorithms)
        brought = {name: algorithm for plugin in plugins for name, algorithm in plugin.algorithms.items()}
        return dataclasses.replace(self, algorithms={**self.algorithms, **brought}, plugins=plugins)

    def _build(self, name: str, values: Mapping[str, Any], *, print_config: bool) -> tuple[Config, Extra | None]:
        own = {flag.name for flag in flags_of(self.extra)} if self.extra else set()
        extra = section_from_mapping(self.extra, values) if self.extra else None
        of_run = {k: v for k, v in values.items() if k not in own}
        config = config_from_mapping(self.algorithms[name], of_run, plugins=self.plugins)
        if self.check is not None:
            self.check(config, extra)
        if print_config:
            sys.stdout.write(to_yaml(config, extra))
            raise SystemExit(0)
        return config, extra

    def _sections(self, name: str) -> tuple[type[Section], ...]:
        return (*section_types(self.algorithms[name]), *((self.extra,) if self.extra else ()))

    def _flags(self, name: str) -> dict[str, Flag]:
        return {flag.name: flag for section in self._sections(name) for flag in flags_of(section)}

    def _own_names(self) -> set[str]:
        """The names of all flags that there are, of any algorithm; no other tool's meaning takes one over."""
        sections = [section for name in self.algorithms for section in self._sections(name)]
        return {"rlhf_type", PLUGIN, *STEERING, *(flag.name for section in sections for flag in flags_of(section))}

    def _algorithm_name(self, wanted: Any) -> str:
        name = str(wanted or self.algorithm or DEFAULT_ALGORITHM)
        if name not in self.algorithms:
            advice = advice_for_method(name, self.algorithms)
            if advice:
                raise ValueError(f"--rlhf_type {name}: {advice}")
            choices = ", ".join(self.algorithms)
            raise ValueError(f"--rlhf_type {name}: must be one of {choices}.{did_you_mean(name, self.algorithms)}")
        if self.algorithm not in (None, name):
            raise ValueError(
                f"--rlhf_type {name}: {self.prog} runs {self.algorithm}; use {_other_verb(self.prog, 'rlhf')} or "
                f"{_other_verb(self.prog, name)}."
            )
        return name

    def _parser(self, name: str) -> Parser:
        parser = new_parser(self.prog, self.description, self._example())
        add_steering_flags(parser, self.algorithms)
        for section in self._sections(name):
            add_section(parser, section)
        return parser

    def _example(self) -> str:
        chosen = "" if self.algorithm else f" --rlhf_type {DEFAULT_ALGORITHM}"
        searched = ["--search beta=grid:0.05,0.1,0.5 learning_rate=loguniform:1e-6:1e-4"] if self.extra is TuneConfig else []
        lines = [
            f"example:\n  {started_as(self.prog)}{chosen}",
            "--model_type llava1_6-mistral-7b-instruct --dataset rlaif-v#1000",
            "--num_train_epochs 2 --learning_rate 5e-5 --output_dir output/first",
            *searched,
        ]
        return " \\\n      ".join(lines)

    def _refuse_unknown(self, name: str, from_files: Mapping[str, Any], rest: Sequence[str]) -> None:
        known = self._flags(name)
        problems = [self._unknown(name, unknown) for unknown in _unknown_names(from_files, known, rest)]
        if not problems and rest:
            problems = [_unexpected_word(rest[0])]
        if problems:
            raise ValueError("\n".join(problems))

    def _unknown(self, name: str, flag_name: str) -> str:
        owners = [other for other, section in self.algorithms.items() if flag_name in {f.name for f in flags_of(section)}]
        if owners:
            *others, last = owners
            words = f"{', '.join(others)} and {last}" if others else last
            return f"--{flag_name} belongs to {words}, not {name}."
        for verb, section in (("tune", TuneConfig), ("plan", PlanConfig), ("iterate", IterateConfig)):
            if flag_name in {flag.name for flag in flags_of(section)}:
                return f"--{flag_name} belongs to {_other_verb(self.prog, verb)}, not {self.prog}."
        if flag_name in STEERING:
            return f"--{flag_name} belongs to the command line, not in a file."
        known = (*self._flags(name), "rlhf_type", PLUGIN, *STEERING)
        return _unknown_flag(flag_name, known)


def _other_verb(prog: str, verb: str) -> str:
    """The name of another verb's program, beside one that was started as `pipelines/dpo.py` or as `rayalign dpo`."""
    return f"pipelines/{verb}.py" if prog.endswith(".py") else f"{prog.rpartition(' ')[0]} {verb}"


def _unknown_names(from_files: Iterable[str], known: Container[str], rest: Iterable[str]) -> list[str]:
    """The flags that there are not: of the files' and, in `rest`, of the command line's."""
    return [key for key in from_files if key not in known] + [word[2:].split("=")[0] for word in rest if word.startswith("--")]


def _unknown_flag(name: str, known: Collection[str]) -> str:
    advice = advice_for(name)
    if advice:
        return advice
    meanings = {alias.name: alias.flag for alias in ALIASES if alias.flag in known} | {flag: flag for flag in known}
    meant = nearest(name, meanings)
    return f"Unknown flag --{name}." + (f" Did you mean --{meanings[meant]}?" if meant else "")


def _unexpected_word(word: str) -> str:
    return f"Unexpected word {word!r}: every value follows its --flag."
