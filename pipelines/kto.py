"""Kahneman-Tversky optimisation: responses that are each labelled good or bad, or pairs."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line

if __name__ == "__main__":
    config = command_line.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/kto.py", description=__doc__, algorithm="kto")
    command_line.configure_logging()

    from rayalign import main  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        main.run(config)
