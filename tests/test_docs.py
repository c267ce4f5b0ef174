"""README and docs tell what is there: their commands are taken by the real parsers, their snippets compile, their links and the
files and flags that they name exist, and their pictures and tables are as the code is today."""

import ast
import contextlib
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rayalign
from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.config import section_types
from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.flags import flags_of
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig, IterateConfig, ScoreConfig
from rayalign.config.plan import PlanConfig
from rayalign.config.serving import ChatConfig, ExportConfig, ServeConfig
from rayalign.config.tune import TuneConfig
from rayalign.sweeps.search_checks import check_search

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DRAWINGS = ROOT / "docs" / "drawings"
CONFIGS = ROOT / "pipelines" / "configs"

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))?)+", re.MULTILINE)
COMMAND = re.compile(r"^(?:rayalign|python pipelines/)\S*.*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:(?:rayalign|pipelines|tests|benchmarks|docs|examples)/[\w./-]*|[\w-]+\.(?:md|toml|lock|yaml))")
ELSEWHERE = re.compile(
    r"(dropped|metrics|summary|config|best|held_out|prefs|reference|sweep)\.\w+|dataset_info.json|\w+_config.json"
)

MOST_README_LINES = 125
"""What someone reads who has two minutes."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language ('' where none is named) and text of a page's code."""
    text = page.read_text()
    yield from FENCED.findall(text)
    for found in INDENTED.findall(FENCED.sub("", text)):
        yield "", "\n".join(line[4:] for line in found.splitlines())


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """The words of every command of ours in a page, those behind `ray job submit ... --` included."""
    for language, text in blocks(page):
        if language in ("", "bash"):
            for command in COMMAND.findall(re.sub(r" -- +", "\n", text.replace("\\\n", " "))):
                yield tuple(shlex.split(re.sub(r" # .*", "", command)))


def read_by_the_parser(words: tuple[str, ...]) -> None:
    """Raises SystemExit for a verb, flag or value that there is not."""
    program, *rest = words
    verb, *flags = rest if program == "rayalign" else (Path(rest[0]).stem, *rest[1:])
    here = [str(CONFIGS / Path(word).name) if word.endswith(".yaml") and "://" in word else word for word in flags]
    told = {"prog": f"pipelines/{verb}.py", "description": ""}
    if verb == "tune":
        command_line.parse_sweep(ALGORITHMS, here, check=check_search, **told)
    elif verb == "plan":
        command_line.parse_plan(ALGORITHMS, here, **told)
    elif verb == "iterate":
        command_line.parse_rounds(ALGORITHMS, here, **told)
    elif verb in WITH_INFERENCE:
        command_line.parse_sections((InferenceConfig, WITH_INFERENCE[verb]), here, example="", **told)
    elif verb in OTHER_VERBS:
        command_line.parse_section(OTHER_VERBS[verb], here, example="", **told)
    else:
        assert verb in (*ALGORITHMS, "rlhf"), f"there is no verb {verb}"
        command_line.parse(ALGORITHMS, here, algorithm=None if verb == "rlhf" else verb, **told)


WITH_INFERENCE: dict[str, Any] = {"evaluate": EvaluateConfig, "generate": GenerateConfig, "score": ScoreConfig}
OTHER_VERBS: dict[str, Any] = {"export": ExportConfig, "serve": ServeConfig, "chat": ChatConfig}
SECTIONS = [s for a in ALGORITHMS.values() for s in section_types(a)] + [TuneConfig, PlanConfig, *OTHER_VERBS.values()]
SECTIONS += [InferenceConfig, IterateConfig, *WITH_INFERENCE.values()]
FLAGS = {flag.name for section in SECTIONS for flag in flags_of(section)} | {"config", "rlhf_type", "plugin"}
COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]
SNIPPETS = [(page.name, text) for page in PAGES for language, text in blocks(page) if language == "python"]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join((page, *words))[:90] for page, words in COMMANDS])
def test_a_command_of_the_pages_is_one_that_the_parser_takes(
    page: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT if "--config" in words else tmp_path)
    for name, text in SNIPPETS:
        if "--plugin" in words and name == page and "ALGORITHMS = (" in text:
            (tmp_path / words[words.index("--plugin") + 1]).write_text(text)
    with pytest.raises(SystemExit, match=r"^0$") if "--print_config" in words else contextlib.nullcontext():
        read_by_the_parser(words)


def test_the_pages_show_the_commands_that_a_newcomer_needs() -> None:
    assert {words[1] for page, words in COMMANDS if page == "README.md"} >= {"sft", "dpo"}
    assert {words[1] for _, words in COMMANDS} >= {"sft", "dpo", "rlhf", "tune", "plan", "export"}


@pytest.mark.parametrize("words", ["rayalign dpo --no_such_flag 1", "rayalign dpo --beta none", "rayalign dop --beta 1"])
def test_a_wrong_command_would_be_noticed(words: str) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        read_by_the_parser(tuple(words.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"<!-- begin.*?<!-- end", "", page.read_text(), flags=re.DOTALL)  # names of other tools' flags
    named = {
        (command, flag)
        for command in CODE.findall(text)
        if command.startswith(("--", "rayalign"))
        for flag in re.findall(r"(?:^| )--([a-z_0-9]+)", command)
    }
    assert {flag for _, flag in named} <= FLAGS | {"print_config", "help", "version"}


def test_the_targets_and_scripts_that_the_pages_run_exist() -> None:
    code = "\n".join(text for page in PAGES for _, text in blocks(page)) + "\n".join(
        found for page in PAGES for found in CODE.findall(page.read_text())
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) - targets == set()
    scripts = set(re.findall(r"^(?:python|pytest|\.venv/bin/pytest -q) ([\w/.]+)", code, re.MULTILINE))
    assert {"examples/quickstart/run.py", "tests/same_numbers.py"} <= scripts
    assert [script for script in sorted(scripts) if not (ROOT / script).exists()] == []


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[f"{page}: {text[:40]!r}" for page, text in SNIPPETS])
def test_a_snippet_compiles_and_uses_only_names_and_flags_that_rayalign_has(page: str, text: str) -> None:
    tree = ast.parse(text)
    compile(tree, page, "exec")
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rayalign"
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("rayalign.")]
    assert {word.arg for call in calls for word in call.keywords} <= FLAGS
    assert used <= set(rayalign.__all__)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rayalign")]
    for node in imported:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    named = [word for code in CODE.findall(page.read_text()) for word in code.split() if FILE.fullmatch(word)]
    ours = [word for word in named if "NAME" not in word and not ELSEWHERE.fullmatch(word)]
    assert [word for word in ours if not (ROOT / word).exists() and not (ROOT / "docs" / word).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_every_page_is_in_the_navigation() -> None:
    in_navigation = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert in_navigation == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", ["flow", "row", "layers"])
def test_the_drawings_are_of_todays_code(name: str) -> None:
    draw = _script(DRAWINGS / "draw.py")
    drawn = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    assert getattr(draw, name)() == drawn, "the folders have changed: `python docs/drawings/draw.py` draws them again"


def test_the_pictures_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in (ROOT / "docs" / "pictures").iterdir()}
    assert {"flow.svg", "row.svg", "layers.svg", "report.png", "sweep.png", "evaluation.png", "rounds.png"} <= sizes.keys()
    assert max(sizes.values()) < 300_000


@pytest.mark.parametrize("page", ["moving-over.md", "python.md"])
def test_what_a_page_shows_of_the_code_is_of_today(page: str) -> None:
    tables = _script(ROOT / "docs" / "tables.py")
    assert page in tables.TABLES
    assert tables.filled(page) == (ROOT / "docs" / page).read_text(), "the code has changed: `make configs` writes it again"


def _script(file: Path) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
