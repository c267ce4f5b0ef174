"""The matrix that ends the tests of chat templates: what each conversation became."""

import pytest

OUTCOMES = "chat template outcome"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each template, a column for each kind of conversation: + written as it is, - dropped with a reason."""
    matrix: dict[str, dict[str, str]] = {}
    for report in terminalreporter.getreports("passed"):
        for _, (name, conversation, sign) in (p for p in report.user_properties if p[0] == OUTCOMES):
            matrix.setdefault(name, {})[conversation] = matrix.get(name, {}).get(conversation, "") + sign
    if not matrix:
        return
    columns = list(dict.fromkeys(conversation for line in matrix.values() for conversation in line))
    terminalreporter.section("chat templates (+ written, - dropped; with a picture and without)", sep="-")
    terminalreporter.write_line(" " * 24 + "  ".join(columns))
    for name, line in matrix.items():
        cells = "  ".join(line.get(column, "").ljust(len(column)) for column in columns)
        terminalreporter.write_line(f"{name:<24}{cells}")
