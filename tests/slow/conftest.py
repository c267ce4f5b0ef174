"""One cluster and one model with real weights for all slow tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, running_cluster
from tests.integration.conftest import cluster_of_four_cpus, good_records, model, records

__all__ = ["cluster_of_four_cpus", "good_records", "model", "records"]


@pytest.fixture(scope="session")
def vlm() -> Path:
    from tests.real.vlm import real_vlm  # imports torch and transformers

    return real_vlm()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, vlm: Path) -> Iterator[Cluster]:
    """Logical CPUs: two workers and the data tasks beside them also on a machine of two cores."""
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=4) as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what the tests measured."""
    figures = [figure for report in terminalreporter.getreports("passed") for figure in report.user_properties]
    if figures:
        terminalreporter.write_sep("-", "figures")
    for name, value in figures:
        terminalreporter.write_line(f"{name}: {value}")
