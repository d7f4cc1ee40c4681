"""Sending commands and waiting for the one answer each of them gets."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

import msgspec
import typer

from schemas import topics
from schemas.commands import AnyCommand
from schemas.envelope import binary_headers, fault_path
from schemas.notices import NoticeKind
from streams.cli.output import (
    EXIT_CONFLICT,
    EXIT_UNKNOWN,
    EXIT_USAGE,
    Output,
    fail,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import Settings

SOURCE: Final = "credits-cli"
# How the pattern of an amount begins, wherever a library quotes it.
_AMOUNT: Final = "^-?(0|[1-9][0-9]{0,9})"
_FIRST_ANSWERS: Final = (NoticeKind.COMMAND_APPLIED, NoticeKind.COMMAND_REFUSED)

IdOption = typer.Option("--id", help="Repeat an earlier command by its id; it is booked once.")
WaitOption = typer.Option("--wait", help="Seconds to wait for the answer.", min=0)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it is written. Members that are None are left out."""

    tenant_id: str
    command_id: str
    command: dict[str, Any]

    def value(self, now: datetime) -> bytes:
        """The record's value."""
        given = {name: value for name, value in self.command.items() if value is not None}
        return msgspec.json.encode({**given, "issued_at": now, "issued_by": issued_by()})

    def fault(self) -> str | None:
        """What no worker would understand, None when all is well: such a command would end in
        the dead letters, without an answer."""
        if not 0 < len(self.command_id) <= 255:
            return "an id has 1 to 255 characters"
        try:
            msgspec.json.decode(self.value(datetime.now(UTC)), type=AnyCommand)
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at ")[0]
            if _AMOUNT in what:
                what = "no amount such as 20 or 20.00"
            return f"{fault_path(error).removeprefix('$.')}: {what}"
        return None


def new_id() -> str:
    """An id for a command that a person starts (UUIDv7)."""
    import uuid_utils

    return str(uuid_utils.uuid7())


def issued_by() -> str:
    """Who sits at this terminal, for the command's record."""
    from getpass import getuser

    try:
        return getuser()
    except (KeyError, OSError):
        return "unknown"


def home_of(key: bytes, partitions: int) -> int:
    """The partition a tenant's records belong to."""
    from aiokafka.partitioner import murmur2

    partition: int = (murmur2(key) & 0x7FFF_FFFF) % partitions
    return partition


async def ask(
    settings: Settings, orders: Sequence[Order], *, wait_s: float
) -> dict[str, dict[str, Any]]:
    """Write commands; return the notices that answer them by command id, those that came in time.

    A repeated command is answered with its first answer, and a member `repeated`. Raises
    BrokerAwayError, ProvisionError.
    """
    from aiokafka import TopicPartition

    from streams import provision
    from streams.testbed.kafka import read_from_end, started_producer, started_reader

    notices = settings.topics.of(topics.NOTIFICATION)
    await provision.require(settings, [settings.topics.of(topics.COMMAND), notices])
    homes = {
        order.tenant_id: home_of(order.tenant_id.encode(), settings.partitions) for order in orders
    }
    tps = [TopicPartition(notices, number) for number in sorted(set(homes.values()))]
    reader = await started_reader(settings)
    try:
        # From where the notices end before anything is written: the answers come after.
        await read_from_end(reader, tps)
        producer = await started_producer(settings, linger_ms=5)
        try:
            await _write(producer, settings, orders, homes)
        finally:
            await producer.stop()
        answers = await _answers(reader, {order.command_id for order in orders}, wait_s)
    finally:
        await reader.stop()
    repeated = {
        command_id
        for command_id, notice in answers.items()
        if notice["notice"] == NoticeKind.COMMAND_REPEATED
    }
    if repeated:
        partition = tps[0].partition if len(tps) == 1 else None
        for command_id, notice in (await _first_answers(settings, repeated, partition)).items():
            answers[command_id] = {**notice, "repeated": True}
    return answers


async def _write(
    producer: Any, settings: Settings, orders: Sequence[Order], homes: dict[str, int]
) -> None:
    import asyncio

    from aiokafka.errors import KafkaError

    now = datetime.now(UTC)
    name = settings.topics.of(topics.COMMAND)
    try:
        written = [
            await producer.send(
                name,
                key=order.tenant_id.encode(),
                value=order.value(now),
                headers=binary_headers(topics.COMMAND, source=SOURCE, event_id=order.command_id),
                partition=homes[order.tenant_id],
            )
            for order in orders
        ]
        await asyncio.gather(*written)
    except KafkaError as error:
        fail(
            EXIT_UNKNOWN,
            f"The broker did not confirm ({error}); the command may be written. Ask again with "
            f"the same id: --id {orders[0].command_id}"
            if len(orders) == 1
            else f"The broker did not confirm ({error}); some commands may be written. Run the "
            "same again: nothing is booked twice.",
        )


async def _answers(reader: Any, waiting: set[str], wait_s: float) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    deadline = monotonic() + wait_s
    while waiting and monotonic() < deadline:
        for records in (await reader.getmany(timeout_ms=100)).values():
            for record in records:
                notice = msgspec.json.decode(record.value)
                command_id = notice.get("command_id")
                if command_id in waiting:
                    waiting.discard(command_id)
                    answers[command_id] = notice
    return answers


async def _first_answers(
    settings: Settings, ids: Collection[str], partition: int | None
) -> dict[str, dict[str, Any]]:
    from streams.testbed.kafka import read_to_end

    found: dict[str, dict[str, Any]] = {}
    async for record in read_to_end(
        settings, [settings.topics.of(topics.NOTIFICATION)], partition=partition
    ):
        notice = msgspec.json.decode(record.value)
        command_id = notice.get("command_id")
        if command_id in ids and notice["notice"] in _FIRST_ANSWERS:
            found.setdefault(command_id, notice)
    return found


def send(
    context: typer.Context,
    tenant: str,
    command: dict[str, Any],
    command_id: str | None,
    wait_s: float,
) -> None:
    """Send one command, under a new id when none is given, and print its answer.

    Ends the process with 2 when no worker would understand it, 4 when it is refused, 75 when
    there is no answer in time.
    """
    settings = settings_now()
    order = Order(tenant_id=tenant, command_id=command_id or new_id(), command=command)
    fault = order.fault()
    if fault is not None:
        fail(EXIT_USAGE, f"Nothing was sent: {fault}.")
    answers = wait_for(ask(settings, [order], wait_s=wait_s))
    report(output_of(context), answers.get(order.command_id), order.command_id)


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
            "repeated": bool(notice.get("repeated")),
            "tenant_id": notice["tenant_id"],
            "balance": notice.get("balance"),
            "settings_version": notice.get("version"),
            "recharge_id": notice.get("recharge_id"),
            "grant_id": notice.get("grant_id"),
        }
    )
