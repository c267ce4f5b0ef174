"""One cluster, one tiny model and one data set for all integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, free_ports, running_cluster
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def cluster_of_four_cpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Logical CPUs: two workers and the data tasks beside them also on a machine of two cores. Its `s3://` is a port of
    loopback, where the storage tests put a server."""
    (s3_port,) = free_ports(1)
    storage = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAYALIGN_DOWNLOADS": str(tmp_path_factory.mktemp("downloads")),
    }
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=4, env=storage) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="session")
def good_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 records that can all be used."""
    return write_rows(tmp_path_factory.mktemp("good"), 60, seed=1)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 good records and two bad lines."""
    return write_rows(tmp_path_factory.mktemp("data"), 50, extra_lines=("{broken", '{"query": "no answers"}'))
