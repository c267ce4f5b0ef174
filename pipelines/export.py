"""A reward model as one folder with a `score` head, which transformers, ms-swift and vLLM load."""

import sys

from rayalign import cli
from rayalign.config import ExportConfig

if __name__ == "__main__":
    config = cli.parse_section(
        ExportConfig,
        sys.argv[1:],
        prog="pipelines/export.py",
        description=__doc__,
        example="--model output/rm/model --output_dir output/rm/classifier",
    )
    cli.configure_logging()

    from rayalign import export  # here, so that a mistyped flag is answered before torch is loaded

    with cli.user_errors():
        export.run(config)
