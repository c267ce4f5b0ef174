"""A sweep over the flags of any training algorithm: many short runs, ranked by a metric."""

import sys

from rayalign import cli
from rayalign.algorithms import ALGORITHMS

if __name__ == "__main__":
    config, sweep = cli.parse_sweep(ALGORITHMS, sys.argv[1:], prog="pipelines/tune.py", description=__doc__)
    cli.configure_logging()

    from rayalign import planning, tune  # here, so that a mistyped flag is answered before Ray is loaded

    with cli.user_errors():
        if config.run.dry_run:
            sys.stdout.write(f"One trial, without --search\n{planning.plan_run(config, several_runs=True)}")
        else:
            tune.run(config, sweep)
