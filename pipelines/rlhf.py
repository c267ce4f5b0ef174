"""Any training algorithm by name: `--rlhf_type dpo` and so on."""

import sys

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line

if __name__ == "__main__":
    config = command_line.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/rlhf.py", description=__doc__)
    command_line.configure_logging()

    from rayalign import main  # here, so that a mistyped flag is answered before Ray is loaded

    with command_line.user_errors():
        main.run(config)
