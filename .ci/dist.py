"""Builds the source distribution, and from what it holds the wheel: `python .ci/dist.py FOLDER`. Needs no network.

Nothing is left in the checkout, and nothing that an earlier build left there gets in.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTENTS = ("rayalign", "pyproject.toml", "README.md", "LICENSE")


def build(folder: Path) -> tuple[Path, Path]:
    """The files of the source distribution and of the wheel, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        for name in CONTENTS:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source)
        sdist = folder / _backend("build_sdist", source, folder)
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary, filter="data")
        unpacked = Path(temporary) / sdist.name.removesuffix(".tar.gz")
        return sdist, folder / _backend("build_wheel", unpacked, folder)


def _backend(step: str, source: Path, folder: Path) -> str:
    """Runs one step of the build backend that pyproject.toml names, in a folder; returns the name of the file it made."""
    script = f"import sys, setuptools.build_meta as backend; sys.stderr.write(backend.{step}(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(folder.resolve())]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stdout}{done.stderr}")
    return done.stderr.splitlines()[-1]


if __name__ == "__main__":
    for file in build(Path(sys.argv[1])):
        sys.stdout.write(f"{file}\n")
