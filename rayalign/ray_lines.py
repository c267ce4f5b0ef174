"""What is printed and logged of Ray: rayalign's own lines as they are, of Ray's processes and libraries what goes wrong.

Names of Ray that its documentation does not promise stand here as in `cluster`.
"""

import itertools
import logging
import re
import sys
from typing import Any

import ray._private.ray_logging
import ray._private.worker

from rayalign.log_lines import OWN_LINE, configure_logging, quiet_transformers

TRACEBACK_LOGGER = "ray.train.v2._internal.util"
"""Logs the traceback of what a train worker's function raised. Can go when Ray Train leaves that to the driver, which gets it.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/util.py"""

PROGRESS_LOGGER = "ray.data._internal.progress"
"""Warns in each process that progress bars are switched off, once they are. Can go when it no longer does.
https://github.com/ray-project/ray/tree/ray-2.60.0/python/ray/data/_internal/progress"""

ANALYSIS_LOGGER = "ray.tune.analysis.experiment_analysis"
"""Warns at the end of a sweep that the files of TUNE_LOGGERS_VARIABLE are not there. Can go when it doesn't look for them.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/analysis/experiment_analysis.py"""

TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
"""Warns at each start of a cluster that it asks for a token, which is what we want. Can go when that is no warning.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/authentication/authentication_token_setup.py"""

LOG_HANDLER = "ray_print_logs"
"""What prints the lines of Ray's processes in the process that started or joined the cluster, by Ray's `print_to_stdstream` and
`print_worker_logs`.
Can go when Ray documents a way to choose what is printed, and how.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py (`connect`)"""

SILENT_ACTORS = ("PlacementGroupCleaner",)
"""Actors of Ray whose lines are not shown. PlacementGroupCleaner fails where a machine has several clusters, with a long
traceback; `free_lost_workers` does its work. Can go together with that."""

NOISE = re.compile(
    "has constructor arguments in the object store and max_restarts > 0"  # https://github.com/ray-project/ray/issues/53727
    "|Failed to load CPU gemm_4bit_forward"
    "|^USDT:|External init callback must run in same thread"
    "|No available node types can fulfill placement group requests"
    r"|gcs_placement_group_scheduler\.cc:\d+: Failed to remove"
)
"""Lines that are not shown. Ray says the first of actors of its own (PreemptionWatcher), whose restart nobody needs;
bitsandbytes the second when it is imported, before it can be asked not to; torch's profiler the next two when it begins and
ends; Ray's autoscaler the next one, each second, of a sweep's trials that wait where it may bring no more nodes (`nodes` tells
what a run waits for); its head the last one, of a node that was lost. Can go when they say so no more."""

EXPECTED_TRACEBACKS = re.compile(
    r"^.*(?:Error in control loop iteration: The worker group startup timed out|Graceful shutdown of backend failed).*\n"
    r"Traceback .*\n(?: .*\n)*\S.*(?:\n|\Z)",
    re.MULTILINE,
)
"""What Ray Train's controller logs each time that it asks anew for room (TRAIN_START_VARIABLE), of which `nodes` says what is
missing, and when workers can't say goodbye to one that was lost, of which `ray_errors` does. Can go when these are no errors.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/execution/controller/controller.py
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/callbacks/backend_setup.py"""


def quiet_logging() -> None:
    """In a process of Ray or of the command: rayalign's own lines, and of Ray and other libraries only what goes wrong."""
    configure_logging()
    quiet_ray()
    quiet_transformers()


def quiet_ray() -> None:
    """Lets Ray's libraries log warnings only, in this process."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (PROGRESS_LOGGER, TOKEN_LOGGER, ANALYSIS_LOGGER):
        logging.getLogger(name).setLevel(logging.ERROR)


def tidy_worker_logs() -> None:
    """From now on this process, which has joined a cluster, prints what Ray's processes log in a tidy form: rayalign's own
    lines as they are, others behind the name of their process, and not at all what SILENT_ACTORS and NOISE name."""
    dispatcher = ray._private.ray_logging.global_worker_stdstream_dispatcher
    if any(name == LOG_HANDLER for name, _ in dispatcher.handlers):
        dispatcher.remove_handler(LOG_HANDLER)
        dispatcher.add_handler(LOG_HANDLER, print_worker_lines)


def print_worker_lines(logged: dict[str, Any]) -> None:
    """Prints lines of one process of the cluster, as Ray hands them over."""
    if logged.get("actor_name") in SILENT_ACTORS:
        return
    text = EXPECTED_TRACEBACKS.sub("", "".join(f"{line}\n" for line in logged["lines"]))
    lines = (line for line in text.split("\n")[:-1] if not NOISE.search(line))
    for is_own, some in itertools.groupby(lines, key=lambda line: OWN_LINE.match(line) is not None):
        batch = {**logged, "lines": list(some)}
        if is_own:  # all of them: Ray would take lines of several processes that differ in numbers for the same one
            ray._private.worker.print_worker_logs(batch, sys.stderr if logged["is_err"] else sys.stdout, ignore_prefix=True)
        else:
            ray._private.worker.print_to_stdstream(batch, ignore_prefix=False)
