"""A hostile data set through the real preparation on Ray: what became of its rows, and what it took."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rayalign.config.sections import DataConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import prepare
from rayalign.storage import Store
from tests.cluster import Cluster
from tests.hostile.files import Written, faults
from tests.hostile.memory import PeakMemory


@dataclass(frozen=True)
class Outcome:
    """What is wrong with what became of the rows, how many were dropped for which reason, and what the preparation took."""

    faults: list[str]
    reasons: Counter[str]
    seconds: float
    most_bytes: int


def prepare_hostile(written: Written, spec: EncoderSpec, cache: Path, cluster: Cluster) -> Outcome:
    """Prepares a data set on a cluster that this process is connected to."""
    started = time.monotonic()
    with PeakMemory(cluster.pid).watched() as memory:
        data = prepare([str(written.folder)], spec, DataConfig(max_dropped_fraction=1.0), Store.at(str(cache)))
    seconds = time.monotonic() - started
    names = sorted(written.rows)
    lines = data.index().select(["file", "source_row"]).to_pylist()
    kept = [(names[line["file"]], line["source_row"]) for line in lines]
    dropped = data.dropped()
    return Outcome(faults(written, kept, dropped), Counter(line["reason"] for line in dropped), seconds, memory.most_bytes)
