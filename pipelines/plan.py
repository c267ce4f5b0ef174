"""What a run of any training algorithm will need: memory, GPUs, hours and cost, before it is started."""

import sys

from rayalign import cli
from rayalign.algorithms import ALGORITHMS

if __name__ == "__main__":
    config, gpus = cli.parse_plan(ALGORITHMS, sys.argv[1:], prog="pipelines/plan.py", description=__doc__)
    cli.configure_logging()

    from rayalign.planning import plan_run  # here, so that a mistyped flag is answered before Ray is loaded

    with cli.user_errors():
        sys.stdout.write(plan_run(config, gpus))
