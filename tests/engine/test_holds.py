"""Holds in a shard, whatever the order, the batches and the repeats."""

import asyncio
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas import topics
from streams.billing.account import decode_hold, decode_row, encode_row
from streams.billing.parts import NO_HASH
from streams.engine import shard
from streams.engine.rows import HOLD_MARK, owner_of
from tests.billing.builders import NOW, opening
from tests.engine.test_shard import TENANT, Bench, a_phase, restarted

SIGNS = st.tuples(
    st.sampled_from(["start", "progress", "end"]),
    st.sampled_from(["a", "b", None]),
    st.integers(0, 300),
    st.sampled_from([topics.CALL_USAGE, topics.CONFERENCE_USAGE]),
)
# Seconds that pass, and what is read then.
STEPS = st.lists(st.tuples(st.integers(0, 120), st.lists(SIGNS, max_size=4)), max_size=6)


def check(bench: Bench) -> None:
    """The tenant's row and the totals are the sum of the rows of holds."""
    rows = bench.shard._rows.values
    found = [decode_hold(row) for key, row in rows.items() if owner_of(key)[1] == HOLD_MARK]
    held = [hold.nanos for hold in found if not hold.ended]
    account = decode_row(rows[TENANT])
    assert (account.standing.exposure_nanos, account.standing.holds) == (sum(held), len(held))
    assert bench.shard.totals.exposures.get("USD", 0) == sum(held)
    assert bench.shard.totals.holds == len(held)
    now = bench.shard.last_now
    assert all(now < hold.until <= now + timedelta(minutes=3) for hold in found)
    assert all(hold.nanos > 0 or hold.ended for hold in found)
    restarted(bench)


async def play(steps: Any, *, one_by_one: bool, again: bool) -> dict[bytes, bytes]:
    """Read signs of life, and give back the rows; entries name offsets, which repeats move, so
    that the head of their chain is left out."""
    bench = Bench()
    command = opening(opening_balance="10000")
    await bench.book(topics.COMMAND, msgspec.structs.replace(command, command_id="open"))
    number = 0
    for seconds, signs in steps:
        bench.now += timedelta(seconds=seconds)
        # Ticks come by themselves, before anything is read.
        await bench.book()
        read: list[tuple[str, dict[str, Any]]] = []
        for phase, leg, elapsed_s, topic in signs:
            number += 1
            changes = {} if topic == topics.CALL_USAGE else {"conference_id": "m"}
            began = (bench.now - timedelta(seconds=elapsed_s)).isoformat()
            since = began if leg is not None else NOW.isoformat()
            sign = a_phase(number, phase, elapsed_s, leg_id=leg, started_at=since, **changes)
            read.append((topic, sign))
        for topic, sign in [*read, *read] if again else read:
            await bench.book(topic, *([sign] if one_by_one else [sign, sign]))
            check(bench)
        check(bench)
    rows = bench.shard._rows.values
    account = decode_row(rows[TENANT]).changed(head=NO_HASH)
    return {**rows, TENANT: encode_row(account)}


@given(STEPS)
@search(max_examples=40, deadline=None)
def test_what_is_held_is_always_the_sum_of_the_holds_and_repeats_do_not_show(steps: Any) -> None:
    # What counts from a batch's instant would differ by the batches there are.
    with patch.object(shard, "_A_LITTLE", timedelta()):
        once = asyncio.run(play(steps, one_by_one=True, again=False))
        assert once == asyncio.run(play(steps, one_by_one=False, again=True))
