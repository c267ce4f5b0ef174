"""Algorithms and record formats from outside of rayalign: `--plugin my_module` or `--plugin my_loss.py`.

A plugin is a module that says what it brings in `ALGORITHMS` (frozen dataclasses, as in `rayalign.algorithms`) and `FORMATS`
(`rayalign.formats.parse.Format`). A file's text travels to all processes of a run; a module is imported by its name in each.
"""

import copyreg
import dataclasses
import functools
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rayalign.config.flags import flags_of
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TunerConfig

PLUGIN = "plugin"
"""The flag that brings algorithms and record formats of one's own; like --rlhf_type it is of no section."""

HOW_TO_ANNOUNCE = "ALGORITHMS = (MyAlgorithm,) or FORMATS = (MY_FORMAT,)"


@dataclass(frozen=True)
class Plugin:
    """A module as --plugin names it: `argument` is a module's name, or a file's path or URL with the file's text as `source`.

    It pickles without the module, which any process loads when it first needs it.
    """

    argument: str
    source: str | None = None

    @property
    def name(self) -> str:
        """The module's name, or the file's without its ending."""
        return self.argument if self.source is None else Path(self.argument).stem

    @property
    def module(self) -> ModuleType:
        """Raises ValueError where the module can't be imported here."""
        return _import(self.argument) if self.source is None else _run(self.argument, self.source)

    @property
    def algorithms(self) -> Mapping[str, type[Any]]:
        """The algorithms' classes by name."""
        return {algorithm.name: algorithm for algorithm in _announced(self, "ALGORITHMS")}

    @property
    def formats(self) -> tuple[Any, ...]:
        """The record formats; `formats.parse` checks and uses them."""
        return _announced(self, "FORMATS")

    @property
    def text(self) -> bytes:
        """What was loaded: the file's text, or that of the module's own file; empty where a module has none."""
        if self.source is not None:
            return self.source.encode()
        file = self.module.__file__
        return Path(file).read_bytes() if file else b""


def load_plugins(arguments: Sequence[str], algorithms: Mapping[str, type[Any]]) -> tuple[Plugin, ...]:
    """Loads the modules of --plugin beside the `algorithms` that there are already.

    Raises ValueError for a module that is not there, fails or announces nothing, and for an algorithm that has the wrong shape
    or a name that exists already.
    """
    plugins: list[Plugin] = []
    taken = dict.fromkeys(algorithms, "rayalign")
    for argument in arguments:
        plugin = find_plugin(argument)
        if any(plugin.name == other.name for other in plugins):
            raise ValueError(
                f"--plugin {argument}: another plugin has the name {plugin.name}, too. Give one of them, or rename it."
            )
        if not _announced(plugin, "ALGORITHMS") and not plugin.formats:
            raise ValueError(f"--plugin {argument}: the module announces nothing. Give it {HOW_TO_ANNOUNCE}.")
        for algorithm in _announced(plugin, "ALGORITHMS"):
            _check_algorithm(plugin, algorithm)
            if algorithm.name in taken:
                raise ValueError(
                    f"--plugin {argument}: {algorithm.__name__} has the name {algorithm.name!r}, which an algorithm of "
                    f"{taken[algorithm.name]} has already. Give it another name."
                )
            taken[algorithm.name] = argument
            copyreg.pickle(algorithm, functools.partial(_reduce, plugin))
        plugins.append(plugin)
    return tuple(plugins)


def find_plugin(argument: str, *, flag: str = f"--{PLUGIN}") -> Plugin:
    """The module, or the file with its text, that an argument of a flag names. Raises ValueError for a file that can't be
    read."""
    if not argument.endswith(".py") and "/" not in argument:
        return Plugin(argument)
    from rayalign.downloads import read_file  # here, so that flags are read before a file system's library is loaded
    from rayalign.storage import Store

    try:
        return Plugin(Store.at(argument).location, read_file(argument).decode())
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
        raise ValueError(f"{flag} {argument}: {reason}.") from None


def _import(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # as with `python -m`; Ray's workers have the driver's current folder, too
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"--plugin {name}: there is no module {error.name}. It must be installed (or lie in the current folder or on "
                "PYTHONPATH) on every machine of the cluster; a single file can be given by its path, FILE.py."
            ) from None
        raise _failed(name, error) from error
    except Exception as error:
        raise _failed(name, error) from error


def _run(location: str, source: str) -> ModuleType:
    """The module of a file's text, made once in a process; another text is another module."""
    name = f"rayalign_plugin_{Path(location).stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = location
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, location, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise _failed(location, error) from error
    return module


def _failed(argument: str, error: Exception) -> ValueError:
    return ValueError(f"--plugin {argument}: fails when it is imported, with {type(error).__name__}: {error}")


def _announced(plugin: Plugin, attribute: str) -> tuple[Any, ...]:
    announced = vars(plugin.module).get(attribute, ())
    if not isinstance(announced, (tuple, list)):
        raise ValueError(f"--plugin {plugin.argument}: {attribute} is not a tuple. Write {HOW_TO_ANNOUNCE}.")
    return tuple(announced)


def _check_algorithm(plugin: Plugin, algorithm: Any) -> None:
    """Raises ValueError for what has not the shape of an algorithm."""
    problem = _shape_problem(algorithm)
    if problem:
        called = getattr(algorithm, "__name__", repr(algorithm))
        raise ValueError(
            f"--plugin {plugin.argument}: {called} in ALGORITHMS {problem}. An algorithm is a frozen dataclass with `name`, "
            "`needs`, `loss`, and a flag(default, help) for each hyper-parameter: see rayalign/algorithms/algorithm.py."
        )


def _shape_problem(algorithm: Any) -> str | None:
    if not (isinstance(algorithm, type) and dataclasses.is_dataclass(algorithm)):
        return "is no dataclass"
    if not algorithm.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # not in the stubs
        return "is not frozen"
    if not isinstance(getattr(algorithm, "name", None), str):
        return "has no `name`"
    if not hasattr(algorithm, "needs"):
        return "has no `needs`"
    if not callable(getattr(algorithm, "loss", None)):
        return "has no method `loss`"
    sections = (DataConfig, ModelConfig, TunerConfig, OptimizerConfig, RunConfig, ClusterConfig)
    taken = {flag.name for section in sections for flag in flags_of(section)}
    for field in dataclasses.fields(algorithm):
        if "help" not in field.metadata or field.default is dataclasses.MISSING:
            return f"has the field {field.name} without help or default"
        if field.name in taken:
            return f"has a flag --{field.name}, which every run has already"
    try:
        for flag in flags_of(algorithm):
            flag.expected  # noqa: B018  # raises for a type that no flag has
    except (KeyError, TypeError):
        return "has a flag whose type is none of int, float, bool, str, Literal, one of these or None, or a tuple of them"
    except NameError as error:
        return f"has an annotation that can't be read ({error})"
    return None


def _reduce(plugin: Plugin, algorithm: Any) -> tuple[Any, ...]:
    """How a plugin's algorithm is pickled: a process that unpickles it may not have seen the plugin yet."""
    values = {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(algorithm)}
    return _rebuild, (plugin, algorithm.name, values)


def _rebuild(plugin: Plugin, name: str, values: Mapping[str, Any]) -> Any:
    algorithm = plugin.algorithms[name]
    copyreg.pickle(algorithm, functools.partial(_reduce, plugin))  # it may travel on from here
    return algorithm(**values)
