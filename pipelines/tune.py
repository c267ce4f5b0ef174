"""A sweep over the flags of any training algorithm: many short runs, ranked by a metric."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.sweeps.search_space import check_search

if __name__ == "__main__":
    config, sweep = command_line.parse_sweep(
        ALGORITHMS, sys.argv[1:], prog="pipelines/tune.py", description=__doc__, check=check_search
    )
    command_line.configure_logging()

    from rayalign.estimate import plan
    from rayalign.sweeps import tune  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        if config.run.dry_run:
            sys.stdout.write(f"One trial, without --search\n{plan.plan_run(config, several_runs=True)}")
        else:
            tune.run(config, sweep)
