"""Ten thousand hostile rows and pictures through the real preparation, with pictures at the limits of what is taken."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from rayalign.data.encoder_spec import EncoderSpec
from tests.cluster import Cluster, running_cluster
from tests.hostile.files import write
from tests.hostile.run import prepare_hostile

pytestmark = pytest.mark.slow

MOST_BYTES = 1.5e9
"""Of any process, libraries that processes share among it."""
ROWS_OF_A_PART = 2500


@pytest.fixture(scope="module")
def two_cpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that this process is a driver of."""
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=2) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_no_hostile_row_ends_a_preparation_or_fills_the_memory(
    two_cpus: Cluster,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    family: str,
    seed: int,
) -> None:
    spec = EncoderSpec(model=str(model_folder(family)), responses="both")
    tokens = spec.tokenizer.all_special_tokens
    written = write(tmp_path / "data", ROWS_OF_A_PART, seed=seed, special_tokens=tokens)
    outcome = prepare_hostile(written, spec, tmp_path / "cache", two_cpus)
    record_property(
        f"{family}, seed {seed}",
        f"{written.num_rows} rows at {written.num_rows / outcome.seconds:.0f}/s, {len(written.good)} good ones, at most "
        f"{outcome.most_bytes / 2**20:,.0f} MiB in a process; dropped: {dict(outcome.reasons.most_common())}",
    )
    assert outcome.faults == []
    assert outcome.most_bytes < MOST_BYTES
