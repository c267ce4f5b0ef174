"""A sweep on TensorBoard's HParams page: which flags each trial has, beside its curves (`tensorboard --logdir trials`)."""

import logging
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from rayalign.storage import Store
from rayalign.sweeps.trials import TRIALS, Outcome, short
from rayalign.training.sinks import EVENTS, sink_name

logger = logging.getLogger(__name__)

SUFFIX = ".hparams"


def write_hparams(folder: Store, outcomes: Iterable[Outcome], metric: str) -> None:
    """Writes the flags of trials that have ended and have none yet; a store that fails is warned of, and ends nothing."""
    for outcome in outcomes:
        events = folder / TRIALS / outcome.trial.name / EVENTS
        try:
            if outcome.has_ended and not any(file.name.endswith(SUFFIX) for file in events.list()):
                _write(events, outcome, metric)
        except OSError as error:
            logger.warning("Warning: TensorBoard gets no flags of %s (%s)", outcome.trial.words, error)


def _write(events: Store, outcome: Outcome, metric: str) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams

    flags = {name: short(value) if isinstance(value, list) else value for name, value in outcome.trial.flags.items()}
    with tempfile.TemporaryDirectory() as temporary:
        writer = EventsWriter(str(Path(temporary) / "events"), SUFFIX)
        for summary in hparams(flags, {sink_name(metric): 0.0}):
            writer.write_event(Event(wall_time=time.time(), step=0, summary=summary))
        writer.close()
        events.upload(Path(temporary))
