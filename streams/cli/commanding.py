"""Sending a command and waiting for its one answer."""

from datetime import UTC, datetime
from getpass import getuser
from time import monotonic
from typing import Any, Final

import orjson
import typer
import uuid_utils
from aiokafka import TopicPartition
from aiokafka.partitioner import murmur2

from schemas import topics
from schemas.envelope import binary_headers
from schemas.notices import NoticeKind
from streams.cli.output import EXIT_CONFLICT, EXIT_UNKNOWN, Output, fail
from streams.settings import Settings
from streams.testbed.kafka import ends_of, started_producer, started_reader

SOURCE: Final = "credits-cli"


def new_id() -> str:
    """An id for a command that a person starts (UUIDv7)."""
    return str(uuid_utils.uuid7())


def issued_by() -> str:
    """Who sits at this terminal, for the command's record."""
    try:
        return getuser()
    except (KeyError, OSError):
        return "unknown"


def home_of(key: bytes, partitions: int) -> int:
    """The partition a tenant's records belong to."""
    partition: int = (murmur2(key) & 0x7FFF_FFFF) % partitions
    return partition


async def send(
    settings: Settings, tenant: str, command: dict[str, Any], *, command_id: str, wait_s: float
) -> dict[str, Any] | None:
    """Write a command; return the notice that answers it, None when none came in time.

    Raises BrokerAwayError.
    """
    key = tenant.encode()
    tp = TopicPartition(settings.topics.of(topics.NOTIFICATION), home_of(key, settings.partitions))
    reader = await started_reader(settings)
    producer = await started_producer(settings)
    try:
        # From where the notices end before the command is written: its answer comes after.
        end = (await ends_of(reader, [tp]))[tp]
        reader.assign([tp])
        reader.seek(tp, end)
        body = {
            **command,
            "issued_at": datetime.now(UTC).isoformat(),
            "issued_by": issued_by(),
        }
        await producer.send_and_wait(
            settings.topics.of(topics.COMMAND),
            key=key,
            value=orjson.dumps(body),
            headers=binary_headers(topics.COMMAND, source=SOURCE, event_id=command_id),
            partition=tp.partition,
        )
        deadline = monotonic() + wait_s
        while monotonic() < deadline:
            for records in (await reader.getmany(timeout_ms=200)).values():
                for record in records:
                    notice: dict[str, Any] = orjson.loads(record.value)
                    if notice.get("command_id") == command_id:
                        return notice
        return None
    finally:
        await producer.stop()
        await reader.stop()


def report(output: Output, notice: dict[str, Any] | None, command_id: str) -> None:
    """Print the answer; ends the process with 4 when refused, 75 when there is none."""
    if notice is None:
        fail(
            EXIT_UNKNOWN,
            "No answer yet. The command is written and will be answered when a worker runs; ask "
            f"again with the same id: --id {command_id}",
        )
    if notice["notice"] == NoticeKind.COMMAND_REFUSED:
        fail(EXIT_CONFLICT, f"Refused ({notice['rule']}): {notice.get('fix', '')}")
    output.row(
        {
            "command_id": command_id,
            "answer": notice["notice"].removeprefix("command_"),
            "tenant_id": notice["tenant_id"],
            "balance": notice.get("balance"),
            "settings_version": notice.get("version"),
        }
    )


IdOption = typer.Option("--id", help="Repeat an earlier command by its id; it is booked once.")
WaitOption = typer.Option("--wait", help="Seconds to wait for the answer.", min=0)
