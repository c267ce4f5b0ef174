"""The table of largest differences that the parity tests end with."""

from typing import Protocol

import pytest

Table = dict[tuple[str, str], dict[str, float]]
TABLE = pytest.StashKey[Table]()


class RecordDifference(Protocol):
    def __call__(self, subject: str, oracle: str, *, loss: float, gradient: float) -> None: ...


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}


@pytest.fixture
def record_difference(request: pytest.FixtureRequest) -> RecordDifference:
    """`record_difference("cpo", "TRL 1.16", loss=..., gradient=...)` enters a comparison; the table keeps the largest of each.

    Both are relative: of the loss, and of the largest entry of the gradient.
    """
    table = request.config.stash[TABLE]

    def record(subject: str, oracle: str, *, loss: float, gradient: float) -> None:
        line = table.setdefault((subject, oracle), {"loss": 0.0, "gradient": 0.0})
        line.update(loss=max(line["loss"], loss), gradient=max(line["gradient"], gradient))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if not table:
        return
    terminalreporter.section("largest relative differences", sep="-")
    width = max(len(subject) for subject, _ in table)
    for (subject, oracle), line in sorted(table.items()):
        terminalreporter.write_line(
            f"{subject:<{width}}  {oracle:<14} loss {line['loss']:.1e}  gradient {line['gradient']:.1e}"
        )
