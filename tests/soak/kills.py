"""Which processes of a run are killed when: drawn by a seed."""

import random
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

ANYWHERE = ("driver", "node", "raylet", "helper", "everything")
VICTIMS = {
    "preparation": ("data task", *ANYWHERE),
    "reference": ("reference worker", *ANYWHERE),
    **dict.fromkeys(
        ("start", "training", "evaluation", "save", "export", "recovery"), ("train worker", "controller", *ANYWHERE)
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
    kills = []
    moments = ("preparation", "reference", "start", *draw.choices(OF_TRAINING, k=TIMES_IN_TRAINING), "export")
    for number, moment in enumerate(moments):
        # Runs take the victims of a moment in turn, so that each has been killed there after a few runs.
        victims = VICTIMS[moment]
        kills.append(_kill(moment, victims[(run + number + seed) % len(victims)], draw, most_seconds=0.6))
        if draw.random() < AGAIN:
            kills.append(_kill("recovery", draw.choice(VICTIMS["recovery"]), draw, most_seconds=12))
    return kills


def _kill(moment: str, victim: str, draw: random.Random, *, most_seconds: float) -> Kill:
    times = draw.randint(2, 6) if moment == "training" else 1
    return Kill(moment, victim, times, draw.uniform(0, most_seconds), draw.randrange(100))
