"""The cluster, model and data that faults are tried on, and the run that has none."""

from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.integration.conftest import cluster_of_four_cpus, model, records

__all__ = ["cluster_of_four_cpus", "model", "records"]

FLAGS = (
    *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
    *("--num_train_epochs", 6, "--learning_rate", 1e-3, "--logging_steps", 1, "--save_steps", 5, "--eval_steps", 1000),
    *("--precompute_ref_log_probs", "true", "--max_failures", 2),
)
"""Of 36 steps."""


@pytest.fixture(scope="session")
def undisturbed(cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happens to. Its records are in `cache` beside them."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    paths = ("--model", model, "--dataset", records, "--output_dir", folder, "--cache_dir", records.parent / "cache")
    cluster_of_four_cpus.run("pipelines/dpo.py", *paths, *FLAGS)
    return folder
