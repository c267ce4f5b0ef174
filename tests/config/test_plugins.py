"""Algorithms and record formats from modules and files that are not of rayalign."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.cloudpickle
import yaml

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin, load_plugins
from rayalign.formats.parse import own_formats, parse_row

ALGORITHM = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
from rayalign.algorithms.algorithm import Needs
from rayalign.config.flags import check_bounds, flag

@dataclass(frozen=True)
class Mine:
    """Mine"""
    name: ClassVar[str] = "mine"
    needs: ClassVar[Needs] = Needs()
    kind: Literal["soft", "hard"] = flag("soft", "Which of the two.")
    weights: tuple[float, ...] = flag((1.0,), "Weights.", at_least=0)
    def __post_init__(self):
        check_bounds(self)
    def loss(self, policy, batch, counts, statistics=None):
        raise AssertionError("trained by none of these tests")

ALGORITHMS = (Mine,)
'''

FORMAT = """
from rayalign.formats.parse import Format
from rayalign.formats.records import Message, build_record

def parse(row, *, id):
    asked = Message(role="user", content=row["ask"])
    return build_record(id=id, messages=[asked], images=[], chosen=row["good"], rejected=row["bad"])

FORMATS = (Format("mine", "ask, good, bad", {"ask", "good", "bad"}.issubset, parse),)
"""


@pytest.fixture
def plugin_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_loss.py"
    path.write_text(ALGORITHM)
    return path


def parse(*words: object) -> Config:
    return command_line.parse(ALGORITHMS, [str(word) for word in words], prog="pipelines/rlhf.py", description="A test.")


def refusal(folder: Path, text: str) -> str:
    """What is said of a plugin file that holds this text, without its beginning, which names the file."""
    path = folder / "bad.py"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        own_formats(load_plugins([str(path)], ALGORITHMS))
    return str(error.value).replace(str(path), "bad.py").removeprefix("--plugin bad.py: ")


def test_a_files_algorithm_is_trained_by_name_with_its_own_flags(plugin_file: Path) -> None:
    config = parse("--plugin", plugin_file, "--rlhf_type", "mine", "--kind", "hard", "--weights", 1, 2, "--seed", 3)
    assert config.algorithm.name == "mine"
    assert (config.algorithm.kind, config.algorithm.weights, config.optimizer.seed) == ("hard", (1.0, 2.0), 3)
    assert config.replace({"kind": "soft"}).plugins == config.plugins


def test_all_files_behind_an_equals_sign_are_loaded(plugin_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_format.py").write_text(FORMAT)
    config = parse(f"--plugin={tmp_path}/my_format.py", plugin_file, "--rlhf_type=mine", "--kind=hard")
    assert [plugin.name for plugin in config.plugins] == ["my_format", "my_loss"]


def test_help_lists_a_plugins_flags(plugin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--plugin", plugin_file, "--rlhf_type", "mine", "--help")
    output = capsys.readouterr().out
    assert "--kind soft|hard" in output
    assert "|kto|mine" in output


def test_the_printed_configuration_names_the_file_by_its_whole_path_and_runs_again(
    plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse("--plugin", "./my_loss.py", "--rlhf_type", "mine", "--kind", "hard")
    text = command_line.to_yaml(config)
    assert yaml.safe_load(text)["plugin"] == [str(plugin_file)]
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir("/")
    assert parse("--config", tmp_path / "run.yaml") == config


def test_a_plugin_on_the_command_line_stands_for_that_of_the_file(plugin_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(ALGORITHM.replace('"mine"', '"another"'))
    file = tmp_path / "run.yaml"
    file.write_text(f"plugin: {plugin_file}\nrlhf_type: mine\n")
    assert parse("--config", file).algorithm.name == "mine"
    assert parse("--config", file, "--plugin", other, "--rlhf_type", "another").algorithm.name == "another"


def test_a_module_of_the_current_folder_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_algorithms.py").write_text(ALGORITHM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (plugin,) = load_plugins(["my_algorithms"], ALGORITHMS)
    assert (plugin.name, list(plugin.algorithms)) == ("my_algorithms", ["mine"])
    assert plugin.text == ALGORITHM.encode()


@pytest.mark.parametrize("dumps", [pickle.dumps, ray.cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_a_run_travels_to_a_process_that_never_saw_the_file(
    plugin_file: Path, tmp_path: Path, dumps: Callable[[object], bytes]
) -> None:
    config = parse("--plugin", plugin_file, "--rlhf_type", "mine", "--kind", "hard")
    (tmp_path / "config.pickle").write_bytes(dumps(config))
    (tmp_path / "algorithm.pickle").write_bytes(dumps(config.algorithm))
    plugin_file.unlink()
    script = (
        "import pickle, sys\n"
        "load = lambda name: pickle.load(open(name + '.pickle', 'rb'))\n"
        "algorithm, config = load('algorithm'), load('config')\n"
        "again = pickle.loads(pickle.dumps(config))\n"  # from a worker on to others
        "assert again == config and config.algorithm == algorithm\n"
        "print(algorithm.kind, config.replace({'kind': 'soft'}).algorithm.kind, config.plugins[0].name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["hard", "soft", "my_loss"], done.stderr


def test_an_edited_file_is_loaded_anew(plugin_file: Path) -> None:
    before = parse("--plugin", plugin_file, "--rlhf_type", "mine").algorithm
    plugin_file.write_text(ALGORITHM.replace('flag("soft"', 'flag("hard"'))
    assert (before.kind, parse("--plugin", plugin_file, "--rlhf_type", "mine").algorithm.kind) == ("soft", "hard")


def test_rows_of_a_plugins_format_are_read_and_the_others_still_are(tmp_path: Path) -> None:
    path = tmp_path / "my_format.py"
    path.write_text(FORMAT)
    own = own_formats(load_plugins([str(path)], ALGORITHMS))
    record = parse_row({"ask": "Which colour?", "good": "Red.", "bad": "Blue."}, id="1", own=own)
    assert (record.chosen, record.rejected) == ("Red.", "Blue.")
    assert parse_row({"query": "Which?", "response": "Red.", "rejected_response": "Blue."}, id="2", own=own).chosen == "Red."
    with pytest.raises(ValueError, match=r"known formats: mine \(ask, good, bad\); ms-swift 4"):
        parse_row({"what": "ever"}, id="3", own=own)


def test_a_missing_file_or_module_is_said() -> None:
    with pytest.raises(ValueError) as error:
        load_plugins(["nowhere/my_loss.py"], ALGORITHMS)
    assert str(error.value) == "--plugin nowhere/my_loss.py: there is no such file."
    with pytest.raises(ValueError) as error:
        load_plugins(["my_losses.best"], ALGORITHMS)
    assert str(error.value) == (
        "--plugin my_losses.best: there is no module my_losses. It must be installed (or lie in the current folder or on "
        "PYTHONPATH) on every machine of the cluster; a single file can be given by its path, FILE.py."
    )


def test_a_module_that_fails_or_announces_nothing_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path, "import not_there") == (
        "fails when it is imported, with ModuleNotFoundError: No module named 'not_there'"
    )
    assert refusal(tmp_path, "x = 1 +").startswith("fails when it is imported, with SyntaxError: ")
    assert refusal(tmp_path, "x = 1") == (
        "the module announces nothing. Give it ALGORITHMS = (MyAlgorithm,) or FORMATS = (MY_FORMAT,)."
    )
    assert refusal(tmp_path, "ALGORITHMS = {}") == (
        "ALGORITHMS is not a tuple. Write ALGORITHMS = (MyAlgorithm,) or FORMATS = (MY_FORMAT,)."
    )


def test_a_name_that_exists_already_is_refused(tmp_path: Path, plugin_file: Path) -> None:
    assert refusal(tmp_path, ALGORITHM.replace('"mine"', '"dpo"')) == (
        "Mine has the name 'dpo', which an algorithm of rayalign has already. Give it another name."
    )
    twin = tmp_path / "twin.py"
    twin.write_text(ALGORITHM)
    with pytest.raises(ValueError) as error:
        load_plugins([str(plugin_file), str(twin)], ALGORITHMS)
    assert str(error.value) == (
        f"--plugin {twin}: Mine has the name 'mine', which an algorithm of {plugin_file} has already. Give it another name."
    )
    assert refusal(tmp_path, FORMAT.replace('"mine"', '"TRL"')) == (
        "there is a record format named 'TRL' already. Give it another name."
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("@dataclass(frozen=True)", "", "is no dataclass"),
        ("frozen=True", "frozen=False", "is not frozen"),
        ('name: ClassVar[str] = "mine"', "", "has no `name`"),
        ("needs: ClassVar[Needs] = Needs()", "", "has no `needs`"),
        ("def loss", "def step", "has no method `loss`"),
        ('flag("soft", "Which of the two.")', '"soft"', "has the field kind without help or default"),
        ("weights:", "seed:", "has a flag --seed, which every run has already"),
        ("tuple[float, ...]", "dict", "has a flag whose type is none of int, float, bool, str, Literal, one of these or None, "
         "or a tuple of them"),
    ],
)  # fmt: skip
def test_the_wrong_shape_is_said(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert refusal(tmp_path, ALGORITHM.replace(old, new)) == (
        f"Mine in ALGORITHMS {problem}. An algorithm is a frozen dataclass with `name`, `needs`, `loss`, and a flag(default, "
        "help) for each hyper-parameter: see rayalign/algorithms/algorithm.py."
    )


def test_what_is_no_format_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path, "FORMATS = (1,)") == (
        "1 in FORMATS is no record format. Write Format(name, needs, matches, parse), as in rayalign/formats/parse.py."
    )


def test_two_files_of_one_name_are_refused(tmp_path: Path, plugin_file: Path) -> None:
    other = tmp_path / "other" / plugin_file.name
    other.parent.mkdir()
    other.write_text(FORMAT)
    with pytest.raises(ValueError) as error:
        load_plugins([str(plugin_file), str(other)], ALGORITHMS)
    assert str(error.value) == f"--plugin {other}: another plugin has the name my_loss, too. Give one of them, or rename it."


def test_a_mistake_of_a_plugin_is_a_sentence_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--plugin", tmp_path / "gone.py")
    assert capsys.readouterr().err == (
        f"pipelines/rlhf.py: error: --plugin {tmp_path}/gone.py: there is no such file.\n(--help lists every flag)\n"
    )


def test_a_plugin_pickles_by_its_text_alone() -> None:
    plugin = Plugin("/nowhere/my_loss.py", ALGORITHM)
    assert pickle.loads(pickle.dumps(plugin)) == plugin
    assert ALGORITHM.encode() not in pickle.dumps(Plugin("my_module"))
