"""Which processes of a run are killed when: drawn by a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

MOMENTS = {
    "preparation": "Data: encoding",
    "reference": "Reference: computing",
    "start": " train worker",
    "training": "Step ",
    "evaluation": "Evaluating ",
    "save": "Saving the checkpoint",
    "export": "Writing the model",
    "recovery": "",
}
"""What the log says as each begins. Recovery: at once after the kill before."""

ANYWHERE = ("driver", "node", "everything")
VICTIMS = {
    "preparation": (*ANYWHERE, "data task"),
    "reference": (*ANYWHERE, "data task", "train worker"),  # of a sharded model the train workers compute it
    **dict.fromkeys(
        ("start", "training", "evaluation", "save", "export", "recovery"), (*ANYWHERE, "train worker", "controller")
    ),
}

BEFORE_TRAINING = ("preparation", "reference", "start")
"""Moments that may be over by the time of the kill that they come after; a run that trains has missed them."""

OF_TRAINING = ("training", "evaluation", "save")
TIMES_IN_TRAINING = 8
"""Kills of one run while it trains."""

AGAIN = 1 / 2
"""The share of kills that another one follows before the run has recovered."""


@dataclass(frozen=True)
class Kill:
    """What is killed, how many seconds after the log has told of a moment so many times since the last kill."""

    moment: str
    victim: str
    times: int
    seconds: float
    choice: int


def kills_of(run: int, seed: int) -> list[Kill]:
    """The kills of a run: in each stage one, while it trains TIMES_IN_TRAINING, and some in the recovery from these."""
    draw = random.Random(f"{seed}/{run}")
    moments = ["preparation", "reference", "start", *draw.choices(OF_TRAINING, k=TIMES_IN_TRAINING), "export"]
    return [kill for moment in moments for kill in _with_next(moment, draw)]


def _with_next(moment: str, draw: random.Random) -> Iterator[Kill]:
    times = draw.randint(2, 6) if moment == "training" else 1
    yield Kill(moment, _victim(moment, draw), times, draw.uniform(0, 0.6), draw.randrange(100))
    if draw.random() < AGAIN:
        yield Kill("recovery", _victim("recovery", draw), 1, draw.uniform(0, 12), draw.randrange(100))


def _victim(moment: str, draw: random.Random) -> str:
    """Everything half as often as others, as it takes the longest to come back."""
    victims = VICTIMS[moment]
    return draw.choices(victims, [1 if victim == "everything" else 2 for victim in victims])[0]
