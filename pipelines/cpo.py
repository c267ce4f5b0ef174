"""Contrastive preference optimisation: without a reference, held to the chosen responses."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line

if __name__ == "__main__":
    config = command_line.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/cpo.py", description=__doc__, algorithm="cpo")
    command_line.configure_logging()

    from rayalign import main  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        main.run(config)
