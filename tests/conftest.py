"""What every test and the processes it starts run under: offline, one thread, fixed seeds."""

import os
import random
import sys

import pytest

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A driver and the cluster it attaches to must agree; unset, a local cluster asks for a token and its clients send none.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds the libraries that are loaded; a test that never touches torch does not wait for its import."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
