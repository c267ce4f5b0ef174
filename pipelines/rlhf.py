"""Any training algorithm by name: `--rlhf_type dpo` and so on."""

import sys

from rayalign import cli
from rayalign.algorithms import ALGORITHMS

if __name__ == "__main__":
    config = cli.parse(ALGORITHMS, sys.argv[1:], prog="pipelines/rlhf.py", description=__doc__)
    cli.configure_logging()

    from rayalign import pipeline  # here, so that a mistyped flag is answered before Ray is loaded

    with cli.user_errors():
        pipeline.run(config)
