"""How a command ends: the exit code and what stands on stderr."""

import os
import signal

import pytest

from rayalign.config.endings import RunFailed, Terminated, user_errors
from rayalign.retries import StorageFailed


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAYALIGN_TRACEBACK", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--beta 0: must be above 0."), 2, "error: --beta 0: must be above 0.\n"),
        (FloatingPointError("The loss is nan at step 3."), 2, "error: The loss is nan at step 3.\n"),
        (RunFailed("the run was ended."), 1, "error: the run was ended.\n"),
        (StorageFailed("s3://bucket/file: the storage failed."), 1, "error: s3://bucket/file: the storage failed.\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "error: access to a file is refused ([Errno 13] Permission denied: '/x'). Give this user the right to it, or "
            "choose another place.\n",
        ),
        (KeyboardInterrupt("interrupted at step 3."), 130, "interrupted at step 3.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated("interrupted at step 3."), 143, "interrupted at step 3.\n"),
    ],
)
def test_every_end_has_its_code_and_a_sentence(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == words


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    for error in (KeyError("ours"), FileNotFoundError(2, "No such file", "ours")):
        with pytest.raises(type(error)), user_errors():
            raise error


@pytest.mark.parametrize("error", [ValueError("flags"), RunFailed("cluster")])
def test_tracebacks_are_shown_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setenv("RAYALIGN_TRACEBACK", "1")
    with pytest.raises(type(error)), user_errors():
        raise error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_code(capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int) -> None:
    def wait_for_the_signal() -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that a shell put behind ignores Ctrl-C
    try:
        with pytest.raises(SystemExit) as ended, user_errors():
            wait_for_the_signal()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == "interrupted\n"
