"""How many trials there may be at a time: as many as fit the cluster, and where it may grow, some that wait for its nodes."""

import time
from collections.abc import Callable

import ray

from rayalign.cluster import owns_cluster
from rayalign.config.config import Config
from rayalign.config.tune import TuneConfig
from rayalign.nodes import room_for_workers

LOOK_SECONDS = 2.0
"""Between two looks at the cluster."""

MOST_WAITING = 16
"""Each trial that starts processes of its own waits in one, on the head node."""


class Concurrency:
    """Tells it anew while the cluster grows. A trial that waits holds nothing that another one needs: its workers come
    together or not at all, and data and reference have their turn before them.

    What waits is what the autoscaler sees. Of a queue as many wait as fit, so that a cluster may double and double again; of
    what Optuna proposes one, as each proposal looks at the results so far.
    """

    def __init__(
        self, config: Config, sweep: TuneConfig, *, spare_cpus: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._sweep, self._spare_cpus, self._clock = config, sweep, spare_cpus, clock
        self._may_grow = not owns_cluster()
        self.fitting = trials_that_fit(config, spare_cpus=spare_cpus)
        self._looked = clock()

    def most(self) -> int:
        """Trials that may run or wait now."""
        if self._sweep.max_concurrent_trials is not None:
            return self._sweep.max_concurrent_trials
        if not self._may_grow:
            return self.fitting
        if self._clock() - self._looked >= LOOK_SECONDS:
            self.fitting = trials_that_fit(self._config, spare_cpus=self._spare_cpus)
            self._looked = self._clock()
        return self.fitting + (1 if self._sweep.search_alg == "optuna" else min(self.fitting, MOST_WAITING))

    @property
    def words(self) -> str:
        """The number at the start, as the log has it."""
        if self._sweep.max_concurrent_trials is not None:
            return f"up to {self._sweep.max_concurrent_trials} at a time"
        more = ", more where the cluster grows" if self._may_grow else ""
        return f"up to {self.fitting} at a time{more}"


def trials_that_fit(config: Config, *, spare_cpus: int) -> int:
    """Trials whose workers fit the cluster's nodes side by side, with some CPUs to spare; 1 at least."""
    cluster = config.cluster
    of_cpus = (ray.cluster_resources().get("CPU", 1) - spare_cpus) // (cluster.most_workers * cluster.cpus_per_worker)
    return max(1, int(min(of_cpus, room_for_workers(config) // cluster.most_workers)))
