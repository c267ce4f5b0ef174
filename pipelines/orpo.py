"""Odds ratio preference optimisation: fine-tuning and preference in one stage, without a reference."""

import sys

from rayalign import cli
from rayalign.algorithms import ALGORITHMS

if __name__ == "__main__":
    config = cli.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/orpo.py", description=__doc__, algorithm="orpo")
    cli.configure_logging()

    from rayalign import pipeline  # here, so that a mistyped flag is answered before Ray is loaded

    with cli.user_errors():
        pipeline.run(config)
