"""What a run of any training algorithm will need: memory, GPUs, hours and cost, before it is started."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line

if __name__ == "__main__":
    config, gpus = command_line.parse_plan(ALGORITHMS, sys.argv[1:], prog="pipelines/plan.py", description=__doc__)
    command_line.configure_logging()

    from rayalign.estimate.plan import plan_run  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        sys.stdout.write(plan_run(config, gpus))
