"""Fewer steps and fewer faults, as long as the same promise is broken."""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from tests.simulation.schedule import Schedule
from tests.simulation.world import FailedError, run

MOST_RUNS: Final = 600


def failure_of(schedule: Schedule) -> FailedError | None:
    """What a schedule breaks, if anything."""
    try:
        run(schedule)
    except FailedError as error:
        return error
    return None


def shrink(schedule: Schedule, what: str) -> Schedule:
    """A schedule that breaks the same promise and from which no step can be left out, unless that
    takes too many runs."""
    runs = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(schedule):
            runs += 1
            if runs > MOST_RUNS:
                return schedule
            error = failure_of(candidate)
            if error is not None and error.what == what:
                schedule = candidate
                smaller = True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    steps = tuple(schedule.steps)
    size = len(steps)
    length = max(1, size // 2)
    while True:
        for begin in range(0, size, length):
            yield replace(schedule, steps=steps[:begin] + steps[begin + length :])
        if length == 1:
            break
        length = max(1, length // 2)
    if schedule.jitter:
        yield replace(schedule, jitter=0.0)
    if schedule.most < 1_000:
        yield replace(schedule, most=1_000)
    if schedule.tenants > 1:
        yield replace(schedule, tenants=1)
    if schedule.partitions > 1:
        yield replace(schedule, partitions=1)
    for at, step in enumerate(steps):
        if step.gap:
            yield replace(schedule, steps=(*steps[:at], replace(step, gap=0.0), *steps[at + 1 :]))
