"""Hostile rows and pictures through the real preparation: each is dropped with its reason, and no good one is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rayalign.data.encoder_spec import EncoderSpec
from tests.cluster import Cluster
from tests.hostile.files import write
from tests.hostile.run import prepare_hostile

MOST_BYTES = 1.5e9
"""Of any process, libraries that processes share among it."""
SMALL_SIDE = 1000
"""Of the large pictures: those at the limits take minutes and are left to `make slow`."""


@pytest.fixture(scope="module", autouse=True)
def driver(cluster_of_four_cpus: Cluster) -> Iterator[None]:
    """This process as a driver of the cluster."""
    ray.init(address=cluster_of_four_cpus.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_hostile_rows_are_dropped_with_words_and_the_good_ones_among_them_are_kept(
    cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path
) -> None:
    spec = EncoderSpec(model=str(model), responses="both")
    written = write(tmp_path / "data", 150, seed=1, special_tokens=spec.tokenizer.all_special_tokens, side=SMALL_SIDE)
    outcome = prepare_hostile(written, spec, tmp_path / "cache", cluster_of_four_cpus)
    assert outcome.faults == []
    assert len(outcome.reasons) > 10  # all kinds of rows were among them
    assert outcome.most_bytes < MOST_BYTES
