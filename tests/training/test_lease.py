"""Two runs that want one folder, as processes of their own: who gets it, who is told what, and who gives way."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayalign.config.endings import RunFailed
from rayalign.storage import Store
from rayalign.training import lease
from rayalign.training.lease import LEASE, held

QUICK = "from rayalign.training import lease; lease.BEAT_SECONDS, lease.STALE_SECONDS, lease.SETTLE_SECONDS = 0.1, 1.0, 0.1"
HOLD = f"""
import sys, time
{QUICK}
from rayalign.config.endings import user_errors
from rayalign.storage import Store
with user_errors(), lease.held(Store.at(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that runs a text of Python on a folder, and waits for its first line."""
    processes: list[subprocess.Popen[str]] = []

    def begin(folder: Path, text: str = HOLD) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", text, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def hold(folder: Path) -> None:
    with held(Store.at(str(folder))):
        pass


def written(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / LEASE).read_text())
    return content


def write_as_another(folder: Path, **fields: object) -> None:
    """The lease as a process on another machine would have written it."""
    with held(Store.at(str(folder))):
        other = {**written(folder), "token": "another", "host": "node-7", "machine": "node-7 boot", "pid": 12}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("")
    (folder / LEASE).write_text(json.dumps({**other, **fields}))


def test_the_second_of_two_runs_is_told_who_holds_the_folder_and_what_to_do(tmp_path: Path, start: Start) -> None:
    holder = start(tmp_path / "run")
    second = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    host = written(tmp_path / "run")["host"]
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+"
    assert re.fullmatch(
        rf"error: --output_dir {tmp_path}/run is in use by another run \(process {holder.pid} on {host}, since {when}\)\. Its "
        rf"last sign of life was at {when}\. Wait for its end or stop it, or pass another --output_dir\. \(One that was killed "
        r"gives way by itself: on its own machine at once, elsewhere 1 s after its last sign of life\.\)\n",
        second.stderr,
    )
    assert holder.poll() is None


def test_two_runs_that_start_at_the_same_moment_are_told_apart(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        deadline = time.monotonic() + 30
        while sum(run.poll() is None for run in runs) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        (winner,) = (run for run in runs if run.poll() is None)
        assert written(tmp_path)["pid"] == winner.pid
        assert all("is in use by another run" in run.communicate()[1] for run in runs if run is not winner)
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_run_does_not_keep_its_own_restart_waiting(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, reaped: bool
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 600.0)
    holder = start(tmp_path)
    holder.kill()
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    before = time.monotonic()
    hold(tmp_path)
    assert time.monotonic() - before < 1


def test_a_process_id_given_anew_is_not_taken_for_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 600.0)
    with held(Store.at(str(tmp_path))):
        mine = written(tmp_path)
    (tmp_path / LEASE).write_text(json.dumps({**mine, "started": "1"}))
    hold(tmp_path)


def test_a_holder_elsewhere_that_was_lost_is_waited_for_and_then_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_as_another(tmp_path, beat=time.time() + 3600)  # its clock is of no account
    with caplog.at_level(logging.INFO, logger="rayalign.training.lease"):
        hold(tmp_path)
    first, last = caplog.messages
    assert re.fullmatch(
        rf"Lease: {tmp_path} is held by process 12 on node-7, since .*\. Waiting up to 1 s for a sign of life; without one, "
        "this run takes it over",
        first,
    )
    assert last == f"Lease: no sign of life for 1 s: taking over {tmp_path}"


@contextlib.contextmanager
def beating(folder: Path, seconds: float) -> Iterator[None]:
    """A run on another machine, which gives signs of life for some seconds and then ends."""

    def beat() -> None:
        for number in range(int(seconds / 0.1)):
            write = {**content, "number": number, "beat": time.time()}
            Store.at(str(folder / LEASE)).write_json(write)
            time.sleep(0.1)
        (folder / LEASE).unlink()

    write_as_another(folder)
    content = written(folder)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    thread.join()


def test_a_holder_elsewhere_that_is_alive_keeps_the_folder(tmp_path: Path) -> None:
    with beating(tmp_path, 2), pytest.raises(ValueError, match=r"in use by another run \(process 12 on node-7, since"):
        hold(tmp_path)


def test_a_patient_run_waits_for_the_end_of_a_living_holder(tmp_path: Path) -> None:
    with beating(tmp_path, 2), held(Store.at(str(tmp_path)), patience=30):
        assert written(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"pid": 1}', b'{"token": "a"}'])
def test_a_damaged_lease_holds_nobody_up_for_longer_than_a_silent_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    (tmp_path / LEASE).write_bytes(content)
    hold(tmp_path)


def test_a_link_to_nothing_in_the_leases_place_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LEASE).symlink_to(tmp_path / "nowhere")
    with held(Store.at(str(tmp_path))):
        assert written(tmp_path)["pid"] == os.getpid()
    assert not (tmp_path / "nowhere").exists()


def told(folder: Path, change: Callable[[], object]) -> str:
    """What a run is told that holds a folder while something is done to it."""

    def run() -> None:
        with held(Store.at(str(folder))):
            change()
            time.sleep(30)

    with pytest.raises(RunFailed) as caught:
        run()
    return str(caught.value)


def test_a_run_whose_folder_was_taken_ends_with_one_sentence_and_leaves_the_lease_to_the_other(tmp_path: Path) -> None:
    def take() -> None:
        other = {**written(tmp_path), "token": "another", "host": "node-7", "pid": 12}
        Store.at(str(tmp_path / LEASE)).write_json(other)

    assert re.fullmatch(
        rf"--output_dir {tmp_path} was taken over by process 12 on node-7, since .*: this run had given no sign of life for "
        r"1 s\. It ends here and writes nothing more\.",
        told(tmp_path, take),
    )
    assert written(tmp_path)["token"] == "another"


def test_a_run_whose_folder_was_deleted_ends_with_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert told(folder, lambda: shutil.rmtree(folder)) == (
        f"--output_dir {folder} was deleted or moved while the run wrote into it. It ends here. Where nothing of it is left, "
        "the same command starts from step 0, with the records that are encoded."
    )
    assert not folder.exists()


def test_deleting_the_lease_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert told(tmp_path, (tmp_path / LEASE).unlink) == (
        f"{tmp_path}/lease.json was deleted, so --output_dir {tmp_path} is no longer held by this run. It ends here and writes "
        "nothing more; the same command goes on from what is kept."
    )


def test_work_outside_of_the_main_thread_learns_of_the_loss_when_it_checks(tmp_path: Path) -> None:
    errors = []

    def work() -> None:
        try:
            with held(Store.at(str(tmp_path))) as mine:
                Store.at(str(tmp_path / LEASE)).write_json({**written(tmp_path), "token": "another"})
                for _ in range(300):
                    mine.check()
                    time.sleep(0.1)
        except RunFailed as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "was taken over by" in errors[0]


@pytest.mark.parametrize("end", [None, ValueError("flags"), RuntimeError(), KeyboardInterrupt(), SystemExit(3)])
def test_the_folder_is_free_after_any_end(tmp_path: Path, end: BaseException | None) -> None:
    with contextlib.suppress(BaseException), held(Store.at(str(tmp_path))):
        assert (tmp_path / LEASE).exists()
        if end is not None:
            raise end
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_folder_is_free_after_a_signal(tmp_path: Path, start: Start, number: signal.Signals) -> None:
    holder = start(tmp_path)
    holder.send_signal(number)
    assert holder.wait(10) == 128 + number
    assert not (tmp_path / LEASE).exists()


def test_a_folder_that_was_made_for_a_refused_run_is_not_left_behind(tmp_path: Path) -> None:
    with contextlib.suppress(ValueError), held(Store.at(str(tmp_path / "run"))):
        raise ValueError("flags")
    assert not (tmp_path / "run").exists()


def test_a_lease_does_not_keep_a_process_alive_and_no_forked_child_gives_it_up(tmp_path: Path) -> None:
    text = f"""
import os, sys
{QUICK}
from rayalign.storage import Store
holding = lease.held(Store.at(sys.argv[1]))
mine = holding.__enter__()
child = os.fork()
if not child:
    mine.release()
    os._exit(0)
os.waitpid(child, 0)
assert os.path.exists(sys.argv[1] + "/lease.json")
"""
    ended = subprocess.run([sys.executable, "-c", text, str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_moment_of_failing_storage_does_not_cost_the_folder(tmp_path: Path) -> None:
    with held(Store.at(str(tmp_path))) as mine:
        (tmp_path / LEASE).rename(tmp_path / "away")
        (tmp_path / LEASE).mkdir()  # neither readable nor writable
        time.sleep(0.5)
        (tmp_path / LEASE).rmdir()
        (tmp_path / "away").rename(tmp_path / LEASE)
        before = written(tmp_path)["number"]
        deadline = time.monotonic() + 10
        while written(tmp_path)["number"] == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert written(tmp_path)["number"] != before
        mine.check()
