"""The lines that rayalign logs, the same in the command's process and in those of Ray: the time, then what is said."""

import logging
import re
import sys
import warnings

TIME = "%H:%M:%S"

OWN_LINE = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2} ")
"""How a line begins that a process of Ray wrote in this form."""

PACKAGE = "rayalign"


class _Lines(logging.Formatter):
    """Our lines have no name and no level, but for the word that warns; those of libraries have both. `speaker`: whose lines
    they are, where several processes do alike."""

    def __init__(self, speaker: str | None = None) -> None:
        super().__init__()
        self._speaker = f"{speaker}: " if speaker else ""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        before = f"{record.levelname} {record.name}: "
        if record.name.split(".")[0] == PACKAGE:
            warns = record.levelno >= logging.WARNING and not line.startswith("Warning: ")
            before = f"{record.levelname.capitalize()}: " if warns else ""
        return f"{self.formatTime(record, TIME)} {self._speaker}{before}{line}"


def configure_logging(*, of_ray_train: bool = False) -> None:
    """Sends rayalign's log to stderr from INFO on, other libraries' from WARNING on. A process that logs already keeps its way,
    unless it is a worker `of_ray_train`, where Ray has set one that leaves out the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)
    own = logging.getLogger(PACKAGE)
    own.setLevel(logging.INFO)
    if of_ray_train:
        own.handlers, own.propagate = [handler], False
    # It recommends a kernel for CPUs each time it is imported, which peft does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """Keeps bars and warnings of transformers and peft that say nothing to the user off the terminal, in this process."""
    from transformers.utils import logging as transformers_logging  # here: Ray Train's controller has no use for it

    transformers_logging.disable_progress_bar()
    # peft uses transformers' old name of this; the line can go when a peft release uses the new one.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def speak_as(speaker: str) -> None:
    """From now on this process, one of several that do alike, says only what goes wrong, behind the speaker's name."""
    for logger in (logging.getLogger(), logging.getLogger(PACKAGE)):
        for handler in logger.handlers:
            if isinstance(handler.formatter, _Lines):
                handler.setFormatter(_Lines(speaker))
    logging.getLogger(PACKAGE).setLevel(logging.WARNING)
