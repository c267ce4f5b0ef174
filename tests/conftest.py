"""What every test and the processes it starts run under (offline, one thread, fixed seeds); tiny models on disk, each made
once a session; and the matrix that ends the families' tests."""

import functools
import itertools
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rayalign.data.store import EncodedPair, PreparedData

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A driver and the cluster it attaches to must agree; unset, a local cluster asks for a token and its clients send none.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds the libraries that are loaded; a test that never touches torch does not wait for its import."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder(family, **text)`: the folder of a family's tiny model, with changes to its text config."""

    @functools.cache
    def make(family: str, **text: Any) -> Path:
        from tests.tiny_models import save_tiny_model  # imports torch and transformers, which many tests never touch

        return save_tiny_model(tmp_path_factory.mktemp(family), family, text=text)

    return make


@pytest.fixture
def prepare_pairs(tmp_path: Path) -> "Callable[[Sequence[EncodedPair]], PreparedData]":
    """`prepare_pairs(pairs)`: a prepared data set on disk whose row numbers are the pairs' places."""
    from tests.prepared_pairs import prepared

    numbers = itertools.count()
    return lambda pairs: prepared(pairs, tmp_path / f"prepared_{next(numbers)}")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local folder that `s3://bucket` means in this process; models of URLs are copied to the folder `downloads` of the
    test's own."""
    import pyarrow.fs as pafs

    from rayalign import object_store

    (tmp_path / "stores" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("RAYALIGN_DOWNLOADS", str(tmp_path / "downloads"))
    stores = pafs.SubTreeFileSystem(f"{tmp_path}/stores", pafs.LocalFileSystem())
    elsewhere = object_store._connected

    def connected(base: str) -> "tuple[pafs.FileSystem, str]":
        return (stores, "bucket") if base == "s3://bucket" else elsewhere(base)

    monkeypatch.setattr(object_store, "_connected", connected)
    return tmp_path / "stores" / "bucket"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are copied to this machine's disk, as they are copied."""
    from rayalign import storage

    copied: list[str] = []
    copy = storage._copy

    def noted(source: "storage.Store", target: Path) -> None:
        copied.append(source.location)
        copy(source, target)

    monkeypatch.setattr(storage, "_copy", noted)
    return copied


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The contract matrix: a line for each model family, a column for each check of `test_families`, from the run itself."""
    checks: list[str] = []
    matrix: dict[str, dict[str, list[bool]]] = {}
    for passed, outcome in ((True, "passed"), (False, "failed")):
        for report in terminalreporter.stats.get(outcome, ()):
            test = re.search(r"test_families\.py::test_(\w+)\[(\w+)[\]-]", report.nodeid)
            if test is None or report.when != "call":
                continue
            check, family = test.groups()
            if check not in checks:
                checks.append(check)
            matrix.setdefault(family, {}).setdefault(check, []).append(passed)
    if not matrix:
        return
    terminalreporter.section("families x checks (tests passed of tests run)", sep="-")
    for number, check in enumerate(checks, start=1):
        terminalreporter.write_line(f"{number:>3}  {check.replace('_', ' ')}")
    terminalreporter.write_line(" " * 16 + "".join(f"{number:>7}" for number in range(1, len(checks) + 1)))
    for family, results in matrix.items():
        cells = [results.get(check, []) for check in checks]
        row = "".join(f"{f'{sum(cell)}/{len(cell)}' if cell else '':>7}" for cell in cells)
        terminalreporter.write_line(f"{family:<16}{row}")
