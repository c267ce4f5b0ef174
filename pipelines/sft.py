"""Supervised fine-tuning on the chosen responses, the stage before preference alignment."""

import sys

from rayalign import cli
from rayalign.algorithms import ALGORITHMS

if __name__ == "__main__":
    config = cli.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/sft.py", description=__doc__, algorithm="sft")
    cli.configure_logging()

    from rayalign import pipeline  # here, so that a mistyped flag is answered before Ray is loaded

    with cli.user_errors():
        pipeline.run(config)
