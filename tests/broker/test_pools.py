"""Included minutes on a real broker: bought by a command, taken by calls, kept across a restart."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from schemas import topics
from streams.settings import Settings
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.verdict import HOLDS
from streams.testbed.auditor.view import Options
from streams.testbed.kafka import read_to_end
from tests.broker.harness import Worker, audited, drained
from tests.broker.test_bad_input import TENANT, an_event, writing
from tests.cli.conftest import credits_of

pytestmark = pytest.mark.broker


async def test_licences_include_minutes_that_pay_before_credits(
    installation: Settings, workers: Callable[..., Worker], tmp_path: Path
) -> None:
    credits = credits_of(installation)
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC).replace(microsecond=0)
    yesterday = (now - timedelta(days=1)).isoformat()
    opened = credits(
        "tenant", "open", TENANT, "--opening-balance", "10", "--billing-from", yesterday
    )
    assert opened.code == 0, opened.stderr
    given = credits("tenant", "licences", TENANT, "MCOMEETADV", "1", "--effective-from", yesterday)
    assert given.code == 0, given.stderr
    refused = credits("tenant", "licences", TENANT, "MCOPSTN1", "1")
    assert (refused.code, "say where its users are" in refused.stderr) == (4, True)

    async def sent(name: str, **changes: Any) -> None:
        producer = await writing(installation)
        value = an_event(name, now, kind="conf_dial_out", conference_id="m-1", **changes)
        topic = installation.topics.of(topics.CONFERENCE_USAGE)
        await producer.send_and_wait(topic, json.dumps(value).encode(), key=TENANT.encode())
        await producer.stop()
        await drained(installation)

    start = (now - timedelta(hours=2)).isoformat()
    await sent("long", started_at=start, duration_s=58 * 60)
    checkpoint = tmp_path / "checkpoint.json"
    report = await verify(installation, Options(checkpoint_to=checkpoint))
    assert report.exit_code == HOLDS, "\n".join(report.lines())
    worker.kill()
    await workers("again").start().ready()
    await sent("straddling", started_at=start, duration_s=219)
    await sent("paid", started_at=start)
    entries = [
        json.loads(record.value)
        async for record in read_to_end(installation, [installation.topics.of(topics.LEDGER)])
    ]
    taken = [[one["minutes"] for one in entry.get("pools", ())] for entry in entries]
    assert [entry["kind"] for entry in entries] == ["grant", "pool", "charge", "charge"]
    assert taken == [[], [58], [2], []]
    (pool,) = credits("tenant", "show", TENANT).row["pools"]
    month = start[:7]
    if now.isoformat()[:7] == month:
        assert pool == {
            "pool": "conference/MCOMEETADV", "month": month, "included": 60, "used": 60, "left": 0,
        }  # fmt: skip
    assert "included minutes paid all of it" in credits("explain", TENANT, "--entry", "2").stdout
    whole = await audited(installation)
    assert whole.counts["included minutes"] == 60
    onward = await verify(installation, Options(checkpoint_from=checkpoint))
    assert onward.exit_code == HOLDS, "\n".join(onward.lines())
    assert onward.counts["included minutes"] == 60
