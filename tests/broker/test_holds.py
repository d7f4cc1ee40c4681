"""Open calls on a real Kafka: money is asked for during the call, whatever dies meanwhile."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest

from schemas import topics
from streams.settings import Settings
from streams.testbed.kafka import read_to_end
from tests.broker.harness import Worker, audited, drained, until
from tests.broker.test_bad_input import writing
from tests.cli.conftest import credits_of

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
TENANT = "contoso"
# What a minute to London costs by the deck that comes with the product.
MINUTE = Fraction("0.011")


async def written(settings: Settings, topic: str) -> list[dict[str, Any]]:
    """The values of an output topic, in order."""
    name = settings.topics.of(topic)
    return [json.loads(record.value) async for record in read_to_end(settings, [name])]


async def test_a_recharge_is_asked_for_during_the_call_and_a_kill_does_not_show(
    installation: Settings, workers: Workers
) -> None:
    credits = credits_of(installation)
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC).replace(microsecond=0)
    since = now - timedelta(seconds=70)
    hour_ago = (now - timedelta(hours=1)).isoformat()
    opened = ("tenant", "open", TENANT, "--opening-balance", "100", "--billing-from", hour_ago)
    assert credits(*opened).code == 0
    policy = ("--enable", "--trigger", "100", "--amount", "200", "--payment-method", "card-1")
    assert credits("settings", "set", TENANT, *policy).code == 0

    async def send(phase: str, *, waiting: bool = True, **changes: Any) -> None:
        event = {
            "event_id": phase,
            "source": "pbx",
            "tenant_id": TENANT,
            "kind": "international",
            "phase": phase,
            "call_id": "c-1",
            "callee": "+442079460018",
            "started_at": since.isoformat(),
        } | changes
        topic = installation.topics.of(topics.CALL_USAGE)
        producer = await writing(installation)
        await producer.send_and_wait(topic, json.dumps(event).encode(), key=TENANT.encode())
        await producer.stop()
        if waiting:
            await drained(installation)

    def check(*, balance: Fraction, exposure: Fraction, holds: int) -> None:
        row = credits("balance", TENANT).rows[0]
        assert Fraction(row["balance"]) == balance
        assert (Fraction(row["exposure"]), row["holds"]) == (exposure, holds)
        assert Fraction(row["available"]) == balance - exposure

    none, before = Fraction(0), Fraction(100)
    after = before - 2 * MINUTE
    await send("start")
    [request] = await written(installation, topics.REQUESTED)
    assert (request["balance"], Fraction(request["exposure"])) == ("100", MINUTE)
    assert Fraction(request["available"]) == 100 - MINUTE
    check(balance=before, exposure=MINUTE, holds=1)
    why = credits("explain", TENANT).stdout
    assert "0.011 of the balance of 100 is held for open calls" in why

    worker.kill()
    # Written while nobody is there; its repeat comes after.
    await send("progress", waiting=False, duration_s=75)
    again = workers("again").start()
    await again.ready()
    await send("progress", duration_s=75)
    check(balance=before, exposure=3 * MINUTE, holds=1)
    report = await audited(installation)
    assert report.counts["holds"] == 1
    # Metrics follow every second or so.
    await until(lambda: "credits_holds 1.0" in again.probe("/metrics")[1], 30)
    assert 'credits_exposure{currency="USD"} 0.033' in again.probe("/metrics")[1]

    await send("end", duration_s=100)
    check(balance=after, exposure=none, holds=0)
    # In order of the ids' arrival it is late: the call has ended.
    await send("progress", event_id="late", duration_s=99)
    check(balance=after, exposure=none, holds=0)
    again.kill()
    await workers("once_more").start().ready()
    await send("progress", event_id="later", duration_s=98)
    check(balance=after, exposure=none, holds=0)
    charges = [one for one in await written(installation, topics.LEDGER) if one["kind"] == "charge"]
    assert [Fraction(one["amount"]) for one in charges] == [-2 * MINUTE]
    # It has no answer, and is published again with the same id.
    asked = {one["recharge_id"] for one in await written(installation, topics.REQUESTED)}
    assert asked == {request["recharge_id"]}
    report = await audited(installation)
    assert report.counts.get("holds", 0) == 0
