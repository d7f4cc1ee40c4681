"""The long calls of a campaign, without a broker."""

from datetime import timedelta
from itertools import islice
from typing import Any

import orjson

from tests.billing.builders import NOW
from tests.chaos.calls import MOST, LongCalls


def told(seed: int = 3, count: int = 2_000) -> list[dict[str, Any]]:
    """What is told, a word a second."""
    seconds = iter(range(10 * count))
    calls = LongCalls(seed, 50, lambda: NOW + timedelta(seconds=next(seconds)))
    return [orjson.loads(one.value or b"") for one in islice(calls.following(), count)]


def test_the_same_seed_tells_the_same() -> None:
    assert told() == told()
    assert told() != told(seed=4)


def test_a_call_begins_goes_on_and_is_over_once() -> None:
    is_open: dict[str, int] = {}
    over = set()
    for event in told():
        leg, phase = event["leg_id"], event["phase"]
        assert leg not in over
        assert (phase == "start") == (leg not in is_open)
        elapsed_s = event.get("duration_s", 0)
        assert elapsed_s >= is_open.get(leg, 0)
        is_open[leg] = elapsed_s
        if phase == "end":
            over.add(leg)
            del is_open[leg]
        assert len(is_open) <= MOST
    assert over
    assert len(is_open) > MOST // 2
