import importlib.metadata
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rayalign
from rayalign.algorithms import ALGORITHMS
from rayalign.main import VERBS, main

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"ray", "torch", "transformers", "peft", "pyarrow", "numpy"}


def output_of(capsys: pytest.CaptureFixture[str], *words: str, code: int | None = None, prog: str = "rayalign") -> str:
    """What the command writes; `code` is that of its end, None where it just returns."""
    if code is None:
        main(words, prog=prog)
    else:
        with pytest.raises(SystemExit) as stopped:
            main(words, prog=prog)
        assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert not (out and err)
    return out + err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_with_a_line(capsys: pytest.CaptureFixture[str], words: list[str]):
    lines = output_of(capsys, *words).splitlines()
    assert lines[0] == "usage: rayalign VERB [--flag value ...] [--config FILE ...]"
    for name, verb in VERBS.items():
        assert f"  {name:<10}{verb.summary}" in lines
    assert max(map(len, lines)) <= 100


def test_every_algorithm_and_every_pipeline_is_a_verb():
    assert set(ALGORITHMS) <= set(VERBS)
    assert {file.stem for file in (REPOSITORY / "pipelines").glob("*.py")} == set(VERBS)


def test_version_names_what_a_run_depends_on(capsys: pytest.CaptureFixture[str]):
    versions = dict(line.split() for line in output_of(capsys, "--version").splitlines())
    libraries = ("ray", "torch", "transformers", "peft")
    assert versions == {
        "rayalign": rayalign.__version__,
        **{name: importlib.metadata.version(name) for name in libraries},
        "python": platform.python_version(),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pdo"], "Unknown verb pdo. Did you mean dpo?"),
        (["train"], f"Unknown verb train. There are {', '.join(VERBS)}."),
        (
            ["grpo"],
            "grpo: an online method: the model writes responses during the run, and a reward scores them. rayalign trains on "
            "the responses of a data set and has sft, dpo, mdpo, rm, cpo, orpo, simpo, kto.",
        ),
        (["--verson"], "Unknown flag --verson. Did you mean --version?"),
        (["--beta", "1"], "--beta: the verb comes first, then its flags, as in `rayalign dpo --beta ...`."),
    ],
)
def test_a_verb_that_there_is_not_is_told(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert output_of(capsys, *words, code=2) == f"rayalign: error: {message}\n(--help lists every verb)\n"


@pytest.mark.parametrize("prog", ["rayalign", "python -m rayalign"])
def test_help_and_errors_name_the_command_that_was_typed(capsys: pytest.CaptureFixture[str], prog: str):
    text = output_of(capsys, "dpo", "--help", code=0, prog=prog)
    assert text.startswith(f"usage: {prog} dpo [--flag value ...] [--config FILE ...]\n\n{VERBS['dpo'].summary}\n")
    assert f"\nexample:\n  {prog} dpo \\\n" in text
    text = output_of(capsys, "export", "--help", code=0, prog=prog)
    assert f"\nexample:\n  {prog} export --model" in text
    assert output_of(capsys, "dpo", "--rlhf_type", "kto", code=2, prog=prog).startswith(
        f"{prog} dpo: error: --rlhf_type kto: {prog} dpo runs dpo; use {prog} rlhf or {prog} kto.\n"
    )
    assert output_of(capsys, "sft", "--mfu", "1", code=2, prog=prog).startswith(
        f"{prog} sft: error: --mfu belongs to {prog} plan, not {prog} sft.\n"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipeline_and_the_command_read_the_same_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [f"pipelines/{verb}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(f"pipelines/{verb}.py", run_name="__main__")
    of_pipeline = capsys.readouterr().out
    assert of_pipeline.startswith(f"usage: python pipelines/{verb}.py [--flag value ...]")
    of_command = output_of(capsys, verb, "--help", code=0)
    assert of_command == of_pipeline.replace(f"python pipelines/{verb}.py", f"rayalign {verb}")
    assert "pipelines/" not in of_command


def test_the_package_can_be_run_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rayalign", "dpo", "--bata", "1"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("python -m rayalign dpo: error: Unknown flag --bata. Did you mean --beta?\n")


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--version"], 0), (["dpo", "--help"], 0), (["tune", "--bata", "1"], 2), (["pdo"], 2)]
)
def test_help_and_mistakes_are_answered_without_what_computes(words: list[str], code: int):
    script = (
        f"import atexit, sys; atexit.register(lambda: print('LOADED', *{{m.split('.')[0] for m in sys.modules}}));"
        f"from rayalign.main import main; main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == code
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "rayalign" in loaded
    assert HEAVY.isdisjoint(loaded), HEAVY & loaded


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dpo"], "No model given: pass --model FOLDER_OR_HUB_ID, or --model_type with a registered name."),
        (["dpo", "--model", "m"], "No data given: pass --dataset with files, folders, globs or registered names."),
        (
            ["dpo", "--adapter", "a", "--dry_run"],
            "No data given: pass --dataset with files, folders, globs or registered names.",
        ),
        (["plan", "--model", "m"], "No data given: pass --dataset with files, folders, globs or registered names."),
        (
            ["tune", "--model", "m", "--search", "beta=grid:1,2"],
            "No data given: pass --dataset with files, folders, globs or registered names.",
        ),
    ],
)
def test_a_command_without_model_or_data_is_refused_before_anything_is_loaded_or_written(
    tmp_path: Path, words: list[str], told: str
):
    script = (
        f"import atexit, sys; atexit.register(lambda: print(*{{m.split('.')[0] for m in sys.modules}}));"
        f"from rayalign.main import main; main({words!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, f"error: {told}\n")
    assert {"ray", "torch", "transformers"}.isdisjoint(done.stdout.split())
    assert not list(tmp_path.iterdir())


def test_importing_rayalign_loads_nothing_else():
    script = "import sys; before = set(sys.modules); import rayalign; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint(HEAVY | {"pydantic", "yaml"})
