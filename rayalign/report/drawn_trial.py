"""A trial as the sections of a sweep's page draw it (`sweep_page`, `sweep_curves`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayalign.report.charts import Colour, Point

COLOURS: Mapping[str, Colour] = {"finished": "grey", "stopped": "orange", "best": "blue"}
WORDS = {"best": "the best", "finished": "finished", "stopped": "stopped or failed"}


@dataclass(frozen=True)
class DrawnTrial:
    """A trial as the page draws it: its name, the values of its flags, the metric at its end and at each evaluation; what that
    cost; and its steps."""

    name: str
    state: str
    flags: Mapping[str, Any]
    value: float | None
    points: Sequence[Point]
    cost: float | None = None
    steps: int = 0
    num_steps: int | None = None

    @property
    def short_name(self) -> str:
        """Without its flags."""
        return self.name.partition(" (")[0]

    def kind(self, best: "DrawnTrial") -> str:
        """What decides its colour."""
        if self is best:
            return "best"
        return "finished" if self.state == "finished" else "stopped"
