"""What a scorer is: it is made on the driver of a word of --scorer, travels to the actors, and loads there what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rayalign.config.config import Config
from rayalign.data.rows import Sources
from rayalign.formats.records import PreferenceRecord, RecordError
from rayalign.models.source import ModelSource


@dataclass(frozen=True)
class Candidate:
    """A response that is scored: its prompt with the response as the chosen one, the folder that relative image paths start
    from, and the columns of `prompts.PROMPT_FIELDS` with `response` and `sample`."""

    record: PreferenceRecord
    folder: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A score, and what a judge wrote."""

    value: float
    said: str | None = None


Scored = Score | RecordError

ScoreFunction = Callable[[Sequence[Candidate]], list[Scored]]


class Scorer(Protocol):
    """A kind of scorer with what it is to use; it pickles."""

    @property
    def kind(self) -> str:
        """Its name in the results."""
        ...

    @property
    def source(self) -> ModelSource | None:
        """The model that an actor loads for it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its scores depend on, as JSON."""
        ...

    def load(self, config: Config, sources: Sources) -> ScoreFunction:
        """What scores some candidates, `config.optimizer.batch_size` at a time, in order; a RecordError for one that has no
        score. Raises ValueError for what the user can fix."""
        ...
