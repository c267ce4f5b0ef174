import time
from typing import Any

import pytest
from ray.train.v2.api.preemption import PreemptionInfo

from rayalign.training.changes import LOOK_SECONDS, Changes
from tests.watching import Clock


class Ray:
    """What Ray knows of machines that will be taken away; counts how often it is asked."""

    def __init__(self) -> None:
        self.info: PreemptionInfo | None = None
        self.asked = 0

    def __call__(self) -> Any:
        self.asked += 1
        return self.info


def test_a_machine_that_will_be_taken_away_is_news_once(caplog: pytest.LogCaptureFixture) -> None:
    ray, clock = Ray(), Clock()
    changes = Changes(has_room=lambda: False, find=ray, gather=lambda value: [value], clock=clock)

    def look(step: int) -> bool:
        clock.now += LOOK_SECONDS
        return changes.are_near(step)

    assert not look(1)
    ray.info = PreemptionInfo(None, {"node a": [1, 3]})
    assert [look(step) for step in (2, 3, 4)] == [True, False, False]
    ray.info = PreemptionInfo(int(1000 * (time.time() + 90.4)), {"node a": [1, 3], "node b": [0]})
    assert [look(step) for step in (5, 6)] == [True, False]
    assert caplog.messages == [
        "The machine of rank 1, 3 will be taken away: a checkpoint is written at once",
        "The machine of rank 0, 1, 3 will be taken away in 90 s: a checkpoint is written at once",
    ]


@pytest.mark.parametrize(("seconds", "looks"), [(10.0, 100), (LOOK_SECONDS, 100), (LOOK_SECONDS / 10, 11), (0.001, 2)])
def test_workers_look_every_few_seconds_however_long_their_steps_are(seconds: float, looks: int) -> None:
    ray, clock = Ray(), Clock()
    changes = Changes(has_room=lambda: False, find=ray, gather=lambda value: [value], clock=clock)
    for step in range(1, 101):
        clock.now += seconds
        changes.are_near(step)
    assert ray.asked == pytest.approx(looks, abs=1)


def test_the_first_worker_says_for_all_when_the_next_look_is() -> None:
    of_first: list[int] = []
    rays, clocks = (Ray(), Ray()), (Clock(), Clock())
    first = Changes(
        has_room=lambda: False, find=rays[0], gather=lambda value: (of_first.append(value), [value])[1], clock=clocks[0]
    )
    other = Changes(has_room=lambda: False, find=rays[1], gather=lambda value: [of_first[-1], value], clock=clocks[1])
    for step in range(1, 40):
        for changes, clock, seconds in ((first, clocks[0], 1.0), (other, clocks[1], 0.01)):
            clock.now += seconds
            changes.are_near(step)
        assert rays[0].asked == rays[1].asked


def test_room_for_more_workers_is_news_when_the_first_worker_begins_to_see_it() -> None:
    room, clock = [False], Clock()
    changes = Changes(has_room=lambda: room[0], find=Ray(), gather=lambda value: [value], clock=clock)
    other = Changes(has_room=lambda: True, find=Ray(), gather=lambda value: [(value[0], room[0])], clock=clock)
    seen = []
    for step, room[0] in enumerate((False, True, True, False, True)):
        clock.now += LOOK_SECONDS
        seen.append(changes.are_near(step))
        assert other.are_near(step) == seen[-1]
    assert seen == [False, True, False, False, True]
