"""An audit of an installation at work waits for transactions that are open, but not for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from aiokafka import AIOKafkaProducer

from schemas import topics
from streams.settings import Settings
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.records import home
from streams.testbed.auditor.verdict import HOLDS, UNKNOWN, Report
from streams.testbed.auditor.view import Options
from tests.broker.harness import a_transaction

pytestmark = pytest.mark.broker

PARTITION: Final = 2
# It belongs to another partition, so whoever reads it sees that something is wrong.
KEY: Final = next(key for key in (b"a", b"b", b"c", b"d", b"e") if home(key, 4) != PARTITION)
NOTICE: Final = b'{"notice": "strayed"}'


@asynccontextmanager
async def an_open_transaction(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    """A transaction that has written a notice."""
    async with a_transaction(settings, "audited") as producer:
        name = settings.topics.of(topics.NOTIFICATION)
        await producer.send_and_wait(name, NOTICE, key=KEY, partition=PARTITION)
        yield producer


async def still_waiting(settings: Settings) -> "asyncio.Future[Report]":
    """An audit that has not answered after three seconds."""
    auditing = asyncio.ensure_future(verify(settings, Options()))
    done, _ = await asyncio.wait([auditing], timeout=3)
    assert not done, "\n".join((await auditing).lines())
    return auditing


async def test_an_audit_waits_for_an_open_transaction_to_end(installation: Settings) -> None:
    async with an_open_transaction(installation) as producer:
        auditing = await still_waiting(installation)
        await producer.abort_transaction()
        report = await asyncio.wait_for(auditing, 10)
    assert report.exit_code == HOLDS, "\n".join(report.lines())


async def test_what_a_transaction_wrote_that_was_open_is_judged(installation: Settings) -> None:
    async with an_open_transaction(installation) as producer:
        auditing = await still_waiting(installation)
        await producer.commit_transaction()
        report = await asyncio.wait_for(auditing, 10)
    assert report.findings["partition"].violations == 1, "\n".join(report.lines())


async def test_a_transaction_that_does_not_end_is_unknown_and_named(
    installation: Settings,
) -> None:
    async with an_open_transaction(installation) as producer:
        report = await verify(installation, Options(open_within_s=2))
        await producer.abort_transaction()
    assert report.exit_code == UNKNOWN
    (said,) = report.findings["stable"].unknown
    name = installation.topics.of(topics.NOTIFICATION)
    assert said.startswith(f"a transaction is open on {name}/{PARTITION} ")
