"""Corrections through a real broker: the original is found in the ledger, also after a restart."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from schemas import topics
from streams.engine.kafka import connection
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.auditor.records import home
from streams.testbed.kafka import read_to_end
from streams.testbed.load import Plan, tenant_id
from tests.broker.harness import Worker, audited, drained

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
TENANT = tenant_id(1)


class Sender:
    """Writes usage of one tenant."""

    def __init__(self, settings: Settings, now: datetime) -> None:
        self._name = settings.topics.of(topics.CALL_USAGE)
        self._partition = home(TENANT.encode(), settings.partitions)
        self._producer = AIOKafkaProducer(**connection(settings), linger_ms=50)
        self._started_at = (now - timedelta(minutes=10)).isoformat()

    async def __aenter__(self) -> "Sender":
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()

    async def send(self, *events: dict[str, Any]) -> None:
        """All at once, so that they can come in one fetch."""
        sent = []
        for event in events:
            members = {
                "source": "pbx",
                "tenant_id": TENANT,
                "kind": "international",
                "call_id": "c",
                "callee": "+442079460018",
                "started_at": self._started_at,
                "duration_s": 60,
            } | event
            value = json.dumps(members).encode()
            sent.append(
                await self._producer.send(
                    self._name, value, key=TENANT.encode(), partition=self._partition
                )
            )
        for one in sent:
            await one


def a_call(name: str, **changes: Any) -> dict[str, Any]:
    return {"event_id": name} | changes


def a_correction(name: str, of: str, **changes: Any) -> dict[str, Any]:
    return {"event_id": name, "phase": "correction", "corrects": of} | changes


async def entries(settings: Settings) -> list[dict[str, Any]]:
    return [
        json.loads(record.value)
        async for record in read_to_end(settings, [settings.topics.of(topics.LEDGER)])
    ]


def summed_up(booked: list[dict[str, Any]]) -> list[tuple[str, str, int | None]]:
    """Of everything but the opening: what caused it, kind, and the entry it is linked with."""
    return [
        (one["caused_by"]["id"], one["kind"], one.get("links", {}).get("entry"))
        for one in booked
        if one["caused_by"]["source"] == "pbx"
    ]


async def refused(settings: Settings) -> list[str]:
    name = settings.topics.of(topics.dead_letters_of(topics.CALL_USAGE))
    return [
        json.loads(record.value)["event_id"]
        async for record in read_to_end(settings, [name])
        if dict(record.headers)["credits-dlq-reason"] == b"refused"
    ]


async def test_corrections_find_what_they_correct_also_after_a_restart(
    installation: Settings, workers: Workers
) -> None:
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC)
    await load.open_tenants(installation, Plan(tenants=1), now=now)
    async with Sender(installation, now) as sender:
        await sender.send(*(a_call(f"before-{number}") for number in range(20)))
        await drained(installation)
        await sender.send(a_call("e1", duration_s=600), a_call("e2", duration_s=120))
        await drained(installation)
        await sender.send(*(a_call(f"after-{number}") for number in range(20)))
        await drained(installation)

        assert await worker.stop() == 0
        worker = workers().start()
        await worker.ready()
        await sender.send(a_correction("fix-1", "e1", duration_s=60))
        await drained(installation)
        booked = await entries(installation)
        [seq] = [one["seq"] for one in booked if one["caused_by"]["id"] == "e1"]
        assert summed_up(booked)[-2:] == [("fix-1", "reversal", seq), ("fix-1", "charge", seq)]

        # Corrected already, unknown; a correction is corrected under its own id; and what is in
        # the same batch as its correction.
        await sender.send(
            a_correction("second", "e1"),
            a_correction("nobody", "e99"),
            a_correction("fix-2", "fix-1", duration_s=0),
            a_call("e3"),
            a_correction("fix-3", "e3", duration_s=180),
            a_call("e4"),
        )
        await drained(installation)
        booked = await entries(installation)
        by_event = {one["caused_by"]["id"]: one["seq"] for one in booked if one["kind"] == "charge"}
        assert summed_up(booked)[-5:] == [
            ("fix-2", "reversal", by_event["fix-1"]),
            ("e3", "charge", None),
            ("fix-3", "reversal", by_event["e3"]),
            ("fix-3", "charge", by_event["e3"]),
            ("e4", "charge", None),
        ]
        assert await refused(installation) == ["second", "nobody"]

        # That something is corrected is remembered like any id.
        worker.kill()
        await workers().start().ready()
        await sender.send(a_correction("third", "e1"), a_correction("fix-4", "e2", kind="free"))
        await drained(installation)
    assert await refused(installation) == ["second", "nobody", "third"]
    booked = await entries(installation)
    assert summed_up(booked)[-1] == ("fix-4", "reversal", by_event["e2"])
    report = await audited(installation)
    assert report.dead_letters == {"refused": 3}


async def test_a_load_with_corrections_comes_out_as_foreseen(
    installation: Settings, workers: Workers, tmp_path: Any
) -> None:
    await workers().start().ready()
    start = datetime.now(UTC)
    plan = Plan(tenants=20, events=2_000, rate=0, corrections_ppm=100_000)
    await load.open_tenants(installation, plan, now=start)
    produced = await load.produce(installation, plan, start=start)
    await drained(installation)
    expected = tmp_path / "expected.json"
    load.write_expectation(expected, plan, start, produced)
    report = await audited(installation, expected)
    kinds = [one["kind"] for one in await entries(installation)]
    assert kinds.count("reversal") > 75
    assert report.counts["distinct_ids"] == produced.ids
