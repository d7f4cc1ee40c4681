"""Published rate decks: every call is priced by the version in force when it started."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from schemas import topics
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.kafka import read_to_end
from streams.testbed.load import Plan, tenant_id
from tests.broker.harness import Worker, audited, drained, until
from tests.broker.test_bad_input import an_event, writing
from tests.cli.conftest import credits_of

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
HEADER = "Destination Name,Destination Type,Country,Prefix,Price / min,Steps\n"
OTHER = tenant_id(2)


async def prices(settings: Settings) -> dict[str, tuple[str, str, str]]:
    """What every call cost, and by which version."""
    found = {}
    async for record in read_to_end(settings, [settings.topics.of(topics.LEDGER)]):
        entry = json.loads(record.value)
        if entry["kind"] == "charge":
            rate = entry["rate"]
            found[entry["caused_by"]["id"]] = (rate["deck"], rate["version"], entry["amount"])
    return found


async def test_a_call_is_priced_by_the_version_in_force_when_it_started(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    credits = credits_of(installation)
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC).replace(microsecond=0)
    await load.open_tenants(installation, Plan(tenants=2, events=1, rate=0, seed=1), now=now)
    soon = now + timedelta(seconds=90)

    def published(name: str, *rows: str, since: datetime, deck: str = "default") -> None:
        path = tmp_path / f"{name}.csv"
        path.write_text(HEADER + "".join(f"London,landline,GB,{row}\n" for row in rows))
        answer = credits(
            *("tariff", "publish", str(path), "--version", name, "--deck", deck),
            *("--effective-from", since.isoformat(), "--retroactive"),
        )
        assert answer.code == 0, answer.stderr

    async def read(name: str, by: Worker) -> None:
        await until(lambda: f'"version": "{name}"' in by.log, 30, lambda: by.log[-2_000:])

    since_hour = now - timedelta(hours=1)
    published("first", "4420,0.60,", since=since_hour)
    published("second", "4420,0.90,0:0.90/60;60:0.30/1", since=soon)
    published("partners", "4420,0.10,", since=since_hour, deck="partners")
    await read("partners", worker)
    assert credits("tariff", "publish", str(tmp_path / "first.csv"), "--version", "first").code == 4
    assigned = credits("tariff", "assign", OTHER, "partners", "--effective-from", now.isoformat())
    assert assigned.code == 0, assigned.stderr
    assert credits("tariff", "assign", OTHER, "friends").code == 3

    async def sent(**calls: dict[str, object]) -> None:
        producer = await writing(installation)
        for name, changes in calls.items():
            value = an_event(name, now, **changes)
            key = str(value["tenant_id"]).encode()
            topic = installation.topics.of(topics.CALL_USAGE)
            await producer.send_and_wait(topic, json.dumps(value).encode(), key=key)
        await producer.stop()
        await drained(installation)

    before, after = now - timedelta(minutes=10), soon + timedelta(seconds=1)
    await sent(
        long_ago={"started_at": (now - timedelta(hours=2)).isoformat()},
        before={"started_at": before.isoformat()},
        after={"started_at": after.isoformat(), "duration_s": 90},
        others={"tenant_id": OTHER, "started_at": after.isoformat()},
        others_before={"tenant_id": OTHER, "started_at": before.isoformat()},
    )
    worker.kill()
    # One that starts afresh has read them all before it books anything.
    again = workers("again").start()
    await again.ready()
    await sent(later={"started_at": after.isoformat()})
    found = await prices(installation)
    assert {name: one[:2] for name, one in found.items() if name == "long_ago"} == {
        "long_ago": ("default", found["long_ago"][1])
    }
    assert found["long_ago"][1].startswith("file-")
    del found["long_ago"]
    assert found == {
        "before": ("default", "first", "-0.6"),
        "after": ("default", "second", "-1.05"),
        "others": ("partners", "partners", "-0.1"),
        "others_before": ("default", "first", "-0.6"),
        "later": ("default", "second", "-0.9"),
    }
    listed = credits("tariff", "list").rows
    assert [(one["version"], one["in_force"]) for one in listed] == [
        ("first", True),
        ("second", datetime.now(UTC) >= soon),
        ("partners", True),
    ]
    changes = credits("tariff", "diff", "default/first", "default/second").rows
    assert [(one["prefix"], one["before"], one["after"]) for one in changes] == [
        ("4420", "0.60", "0.90")
    ]
    await audited(installation)
