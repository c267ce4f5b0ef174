"""Whether every node of the cluster sees what this machine sees at the run's paths: looked for on each before any work."""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 300
"""How long a node may take to look: a job's environment is made there first."""

ARRIVAL_SECONDS = 10.0
"""How long a network file system may take to show a new file on another machine."""

LISTED = 3
"""Nodes or files that an error names."""


@dataclass(frozen=True)
class SharedFile:
    """A file or folder (`size` None) that all nodes must see, and the flag, as given, whose path it belongs to."""

    given: str
    path: str
    size: int | None


def check_shared_paths(
    inputs: Sequence[SharedFile], written: Mapping[str, str], *, arrival_seconds: float = ARRIVAL_SECONDS
) -> None:
    """Raises ValueError where the cluster has other machines than this one and they don't see what is read, or what this
    process writes; `written` are folders by the flag, as given, that names them. What is seen everywhere is left as it was."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    is_here = not ray.util.client.ray.is_connected()
    if len(nodes) == 1 and is_here:
        return
    logger.info("Looking at the run's paths from %d node%s", len(nodes), "" if len(nodes) == 1 else "s")
    with contextlib.ExitStack() as tokens:
        sought = [*inputs, *(tokens.enter_context(_token(given, Path(folder))) for given, folder in written.items())]
        problem = problem_of(_unseen_by(nodes, sought, arrival_seconds), num_nodes=len(nodes))
    if problem:
        raise ValueError(problem)


def unseen(files: Sequence[SharedFile], seconds: float) -> list[SharedFile]:
    """Those of the files that this process does not see, or with another size, after so many seconds. Runs on each node."""
    deadline = time.monotonic() + seconds
    missing = [file for file in files if not _is_seen(file)]
    while missing and time.monotonic() < deadline:
        time.sleep(0.5)
        missing = [file for file in missing if not _is_seen(file)]
    return missing


def problem_of(found: Mapping[str, Sequence[SharedFile]], *, num_nodes: int) -> str | None:
    """A sentence about the first flag whose path some nodes (by address) don't see; None where there is none."""
    given = next((file.given for files in found.values() for file in files), None)
    if given is None:
        return None
    nodes = [node for node, files in found.items() if any(file.given == given for file in files)]
    of_flag = {file.path: file for files in found.values() for file in files if file.given == given}
    who = f"{_listed(nodes)} (of {num_nodes} nodes) {'does' if len(nodes) == 1 else 'do'}"
    if any(Path(path).name.startswith(TOKEN) for path in of_flag):
        return (
            f"{given}: {who} not see what this machine writes there, so that the run's files would be scattered. Give a folder "
            "of a file system that all nodes mount at the same path, or a URL such as s3://bucket/runs/first."
        )
    return (
        f"{given}: {who} not see the same there as this machine (looked for {_listed(list(of_flag))}). Put it on a file system "
        "that all nodes mount, copy it to the same path on each, or give a URL such as s3://bucket/folder."
    )


TOKEN = ".rayalign_seen_by_all_"

LEFT_SECONDS = 3600
"""Older tokens were left by a command that was killed."""


@contextlib.contextmanager
def _token(given: str, folder: Path) -> Iterator[SharedFile]:
    """A new file in a folder that a run writes to, for as long as it is looked for; the folder, too, if there was none."""
    made = [folder, *folder.parents][: sum(not place.exists() for place in (folder, *folder.parents))]
    token = folder / f"{TOKEN}{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_left(folder)
        token.write_bytes(b"here")
    except OSError as error:
        raise ValueError(f"{given}: can't be written to from this machine ({error.strerror}).") from None
    try:
        yield SharedFile(given, str(token), token.stat().st_size)
    finally:
        token.unlink(missing_ok=True)
        for place in made:
            with contextlib.suppress(OSError):  # something else is in it by now
                place.rmdir()


def _delete_left(folder: Path) -> None:
    for left in folder.glob(f"{TOKEN}*"):
        with contextlib.suppress(FileNotFoundError):  # another command deletes it at the same time
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()


def _unseen_by(nodes: Mapping[str, str], sought: Sequence[SharedFile], arrival_seconds: float) -> dict[str, list[SharedFile]]:
    """What each node, by its address, does not see. Nodes that leave meanwhile are passed over."""
    look = ray.remote(unseen)
    tasks = {
        look.options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            list(sought), arrival_seconds
        ): address
        for node_id, address in nodes.items()
    }
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_SECONDS)
    if late:
        raise ValueError(
            f"{_listed([tasks[task] for task in late])} did not answer within {ANSWER_SECONDS} s, when asked for the run's "
            "paths. Is the node overloaded, or can't the job's environment be made there? Mend it, or take it off the cluster."
        )
    found: dict[str, list[SharedFile]] = {}
    for task in done:
        try:
            found[_free(tasks[task], found)] = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise ValueError(
                f"{tasks[task]}: this node can't run rayalign ({_last_line(error)}). Install it there, in the same version, or "
                "submit the run as a job with --working-dir."
            ) from None
        except ray.exceptions.RayError as error:
            logger.info("Passed over the node %s, which left (%s)", tasks[task], type(error).__name__)
    return found


def _is_seen(file: SharedFile) -> bool:
    try:
        info = os.stat(file.path)
    except OSError:
        return False
    return file.size is None or info.st_size == file.size


def _free(address: str, taken: Iterable[str]) -> str:
    """An address, told from those of other nodes on the same machine."""
    names = (f"{address} ({number})" if number > 1 else address for number in range(1, 1 << 30))
    return next(name for name in names if name not in taken)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:LISTED])
    return shown + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
