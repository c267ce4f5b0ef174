"""A trace of chosen optimizer steps by torch.profiler, a file for each worker; Perfetto and chrome://tracing open it."""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from rayalign.storage import Store

logger = logging.getLogger(__name__)

PROFILE = "profile"
"""The folder of a run's folder that holds the traces."""


def profiled_steps(steps: str | None) -> range:
    """The steps that --profile_steps FIRST:LAST names, both included and counted from 1, as the log does.

    Raises ValueError for what names none.
    """
    if steps is None:
        return range(0)
    form = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", steps.strip())
    first, last = (int(form[1]), int(form[2] or form[1])) if form else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"--profile_steps {steps}: must be FIRST:LAST, steps counted from 1, such as 10:12 (quoted in YAML), or one step."
        )
    return range(first, last + 1)


class StepProfiler:
    """Traces the steps that --profile_steps names, as far as this start of the run comes by them."""

    def __init__(self, steps: range, folder: Store, *, rank: int) -> None:
        self._steps = steps
        self._folder = folder / PROFILE
        self._rank = rank
        self._profile: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        """A step, counted from 1, is about to begin."""
        if self._profile is None and step in self._steps:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = torch.profiler.profile(activities=kinds, record_shapes=True)
            self._profile.start()
            self._first = step

    def after(self, step: int) -> None:
        """A step has ended."""
        if self._profile is not None and step + 1 not in self._steps:
            self._write()

    def close(self) -> None:
        """The run ends; what is open is written."""
        if self._profile is not None:
            self._write()

    def _write(self) -> None:
        """Writes the trace; a store that fails ends no run."""
        profile, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.stop()
        name = f"rank_{self._rank}_step_{self._first}.json.gz"
        with tempfile.TemporaryDirectory() as temporary:
            try:
                profile.export_chrome_trace(str(Path(temporary) / name))
                self._folder.upload(Path(temporary))
            except (OSError, RuntimeError) as error:
                logger.warning("Warning: the trace %s could not be written: %s", (self._folder / name).location, error)
            else:
                logger.info("Trace of the steps from %d on: %s", self._first, (self._folder / name).location)
