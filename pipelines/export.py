"""A reward model as one folder with a `score` head, which transformers, ms-swift and vLLM load."""

import sys

from rayalign.config import command_line
from rayalign.config.sections import ExportConfig

if __name__ == "__main__":
    config = command_line.parse_section(
        ExportConfig,
        sys.argv[1:],
        prog="pipelines/export.py",
        description=__doc__,
        example="--model output/rm/model --output_dir output/rm/classifier",
    )
    command_line.configure_logging()

    from rayalign.serving import export  # here, so that a mistyped flag is answered before torch is loaded

    with command_line.user_errors():
        export.run(config)
