"""Training of a reward model: a score for each response, from preference pairs."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line

if __name__ == "__main__":
    config = command_line.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/rm.py", description=__doc__, algorithm="rm")
    command_line.configure_logging()

    from rayalign import main  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        main.run(config)
