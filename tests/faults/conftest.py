"""The cluster, model and data that faults are tried on."""

from tests.integration.conftest import cluster_of_four_cpus, model, records

__all__ = ["cluster_of_four_cpus", "model", "records"]
