"""The memory that processes take, watched from outside."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.2


class PeakMemory:
    """The most memory (bytes) that any one process below another one has had while `watched` runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peaks: dict[int, int] = {}

    @property
    def most_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    @contextlib.contextmanager
    def watched(self) -> Iterator["PeakMemory"]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(SECONDS_BETWEEN_LOOKS):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self.look()

    def look(self) -> None:
        """The kernel itself keeps the peak of each process (VmHWM), so that nothing between two looks is missed."""
        parents = {int(path.name): parent for path in Path("/proc").glob("[0-9]*") if (parent := _field(path, "PPid"))}
        for pid in parents:
            above = pid
            while above in parents and above != self.pid:
                above = parents[above]
            peak = _field(Path(f"/proc/{pid}"), "VmHWM")
            if above == self.pid and peak:
                self.peaks[pid] = max(self.peaks.get(pid, 0), peak * 1024)


def _field(process: Path, name: str) -> int | None:
    """A number of a process's status; None where the process has ended, or has no such field."""
    try:
        found = re.search(rf"^{name}:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None
