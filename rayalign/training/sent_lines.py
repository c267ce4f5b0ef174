"""What a run's folder notes of the services that its metrics are sent to: under which id each has the run, and which lines they
got, so that a start that goes on sends none twice."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from rayalign.storage import Store

logger = logging.getLogger(__name__)

RUN_IDS = "report_to.json"
"""The file of a run's folder with the ids that services gave the run, by which it goes on there, and what they got ahead of the
checkpoint that it last went on from."""

AHEAD = "ahead"
"""In that file: pairs of a step and names of metrics."""

Line = Mapping[str, float]
"""A line of metrics.jsonl: `step` and metrics by name."""

LineKey = tuple[float, frozenset[str]]


def key_of(line: Line) -> LineKey:
    """What tells a line from others: its step and the names of its metrics."""
    return line["step"], frozenset(line)


def sent_before(folder: Store, lines: Iterable[Line], *, start_step: int) -> frozenset[LineKey]:
    """The keys of the lines that earlier starts of a run sent: of those in its metrics.jsonl, and of those that were cut off as
    they were behind the checkpoint that a start went on from. Notes those behind `start_step`, before they are cut off, too."""
    file = folder / RUN_IDS
    note = _note(file)
    sent = {key_of(line) for line in lines} | {(step, frozenset(names)) for step, names in note.get(AHEAD, ())}
    ahead = [[step, sorted(names)] for step, names in sent if step > start_step]
    if ahead or AHEAD in note:
        file.write_json({**note, AHEAD: sorted(ahead)})
    return frozenset(sent)


def id_of(folder: Store, service: str) -> str | None:
    """The id at a service of a run that it has taken."""
    found = _note(folder / RUN_IDS).get(service)
    return None if found is None else str(found)


def note_id(folder: Store, service: str, run_id: str) -> None:
    """Notes the id, once the service has taken the run: one that never did gets all lines when it does."""
    file = folder / RUN_IDS
    file.write_json({**_note(file), service: run_id})


def _note(file: Store) -> dict[str, Any]:
    try:
        return file.read_json_object() if file.exists() else {}
    except ValueError as error:  # damaged: services begin a run of their own anew
        logger.warning("%s: can't be read (%s)", file.location, error)
        return {}
