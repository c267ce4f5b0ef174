"""What a training pipeline does with its configuration: trains, or, with --dry_run, tells what training would take."""

import sys

from rayalign.config.config import Config
from rayalign.training import driver


def run(config: Config) -> None:
    """Raises ValueError for what the user can mend."""
    if config.run.dry_run:
        from rayalign.estimate.plan import plan_run  # here, so that a run does not wait for what only plans need

        sys.stdout.write(plan_run(config))
    else:
        driver.run(config)
