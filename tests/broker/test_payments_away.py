"""A payment service that is away: its requests wait, and are answered once when it comes back."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from schemas import topics
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.load import Plan
from streams.testbed.payments import Behaviour, Simulator
from tests.broker.harness import Worker, audited, drained, until
from tests.broker.test_holds import written

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
PAYS = Behaviour(decline=0, duplicate=0, reorder=0, delay_ms=0)


async def asked(settings: Settings) -> Counter[str]:
    """How often each recharge was asked for."""
    return Counter(one["recharge_id"] for one in await written(settings, topics.REQUESTED))


async def test_requests_to_a_service_that_is_away_are_repeated_under_their_ids_and_paid_once(
    installation: Settings, workers: Workers
) -> None:
    worker = workers().start()
    await worker.ready()
    plan = Plan(tenants=3, events=800)
    now = datetime.now(UTC)
    await load.open_tenants(installation, plan, now=now)
    await load.produce(installation, plan, start=now)
    await drained(installation)
    first = await asked(installation)
    assert first

    async def repeated() -> bool:
        # Overdue after three seconds, and again, each time later.
        return all(times >= 2 for times in (await asked(installation)).values())

    await until(repeated, 60)
    again = await asked(installation)
    assert again.keys() == first.keys(), "nobody answered, so nothing new may be asked for"
    tenants = [one["tenant_id"] for one in await written(installation, topics.REQUESTED)]
    assert len(set(tenants)) == len(first)
    stop = asyncio.Event()
    paying = asyncio.ensure_future(Simulator(installation, PAYS).run(stop))
    await until(
        lambda: "credits_recharges_in_flight 0.0" in worker.probe("/metrics")[1],
        60,
        lambda: worker.probe("/metrics")[1],
    )
    stop.set()
    await paying
    await drained(installation)
    await audited(installation)
    paid = Counter(
        one["recharge_id"]
        for one in await written(installation, topics.LEDGER)
        if one["kind"] == "recharge"
    )
    assert first.keys() <= paid.keys()
    assert set(paid.values()) == {1}
