"""rayalign as it is installed: the wheel in an environment of its own, run from a folder outside of any checkout.

With RAYALIGN_DIST the distributions of that folder are tested (`make dist`), else new ones are built.
"""

import email.message
import email.parser
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import rayalign
from rayalign.algorithms import ALGORITHMS
from tests.cluster import ROOT

NAME = f"rayalign-{rayalign.__version__}"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel."""
    if given := os.environ.get("RAYALIGN_DIST"):
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, ROOT / ".ci" / "dist.py", folder], check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment that has the wheel, and of all else what this environment has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    words = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True, env=clean_env())
    # A .pth's folder is only searched for modules: the link of an editable rayalign, a .pth in there, is not followed.
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    )
    Path(packages.stdout.strip(), "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(folder: Path, *words: object) -> str:
    """What a program prints that is run in this folder."""
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=clean_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def files_of_the_package() -> set[str]:
    files = (file for file in (ROOT / "rayalign").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(ROOT)) for file in files}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.parser.Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files_of_the_package()
    assert {"rayalign/py.typed", f"{NAME}.dist-info/licenses/LICENSE"} <= names


def test_the_source_distribution_holds_what_a_build_needs(dist: Path) -> None:
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    assert files_of_the_package() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_metadata_are_those_that_an_index_shows(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert (metadata["Name"], metadata["Version"]) == ("rayalign", rayalign.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert any(needed.startswith("ray[") for needed in metadata.get_all("Requires-Dist", []))


def test_the_package_is_imported_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    script = "import rayalign; print(rayalign.__file__, rayalign.train.__name__)"
    place, name = run(tmp_path, environment / "python", "-c", script).split()
    assert Path(place).is_relative_to(environment.parent)
    assert name == "train"


def test_a_report_is_rendered_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    script = (
        "from rayalign.report.conversations import Answers\n"
        "from rayalign.report.page import Times, render_report\n"
        "print(render_report(title='A run', config={}, summary={}, metrics=[], dropped={}, pairs=[], conversations={}, "
        "answers=Answers(), times=Times(), num_steps=1, score_name='reward'))"
    )
    page = run(tmp_path, environment / "python", "-c", script)
    for style in (ROOT / "rayalign" / "report").glob("*.css"):
        assert style.read_text().strip() in page


def test_the_command_tells_its_version(environment: Path, tmp_path: Path) -> None:
    assert run(tmp_path, environment / "rayalign", "--version").startswith(f"rayalign {rayalign.__version__}\n")


def test_the_command_lists_its_verbs_and_the_flags_of_each(environment: Path, tmp_path: Path) -> None:
    verbs = run(tmp_path, environment / "rayalign", "--help")
    assert all(f"  {name} " in verbs for name in (*ALGORITHMS, "rlhf", "tune", "plan", "export"))
    assert "--rpo_alpha" in run(tmp_path, environment / "rayalign", "dpo", "--help")


def test_the_command_plans_with_the_configs_that_come_along(environment: Path, tmp_path: Path) -> None:
    row = '{"query": "Which colour is it?", "response": "It is red.", "rejected_response": "It is blue."}\n'
    (tmp_path / "pairs.jsonl").write_text(row * 4)
    told = run(tmp_path, environment / "rayalign", "plan", "--model_type", "internvl2-2b", "--dataset", "pairs.jsonl")
    assert told.startswith("Plan: DPO of internvl2-2b (config that comes with rayalign; the model's files are not at hand)")
