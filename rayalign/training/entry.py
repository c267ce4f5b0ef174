"""What Ray Train starts in each worker.

Its controller imports this module, too, and opens what is handed through it. So nothing is imported here but where a worker
runs, and the job goes through as bytes.
"""

import pickle
from pathlib import PurePath
from typing import Any

JOB = "job"
"""Among the settings that a worker gets: its configuration and data, pickled."""

REPORTS_EVALUATIONS = "reports_evaluations"
"""Another: whether somebody (a sweep) wants to hear of each evaluation, whatever --save_steps says."""


def train_loop(settings: dict[str, Any]) -> Any:
    """Runs in each worker; returns its `WorkerResult`, or what stopped it."""
    from rayalign.log_lines import configure_logging, speak_as
    from rayalign.ray_lines import quiet_logging
    from rayalign.training.endings import hide_known_tracebacks
    from rayalign.training.group import OfRayTrain
    from rayalign.training.worker import train_worker

    configure_logging(of_ray_train=True)
    quiet_logging()
    hide_known_tracebacks()
    config, data = pickle.loads(settings[JOB])
    if settings[REPORTS_EVALUATIONS]:
        speak_as(PurePath(str(config.run.output_dir)).name)
    return train_worker(config, data, OfRayTrain(hears=settings[REPORTS_EVALUATIONS]))
