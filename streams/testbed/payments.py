"""A simulated payment service: pays, declines, delays, repeats, reorders, or says nothing.

What it answers to a request is derived from seed and recharge id, so a repeated request and a
restarted simulator get the same answer under the same ids.
"""

import asyncio
import random
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid5

import msgspec
import orjson
from aiokafka.errors import KafkaError
from msgspec import Struct

from schemas import topics
from schemas.envelope import binary_headers
from schemas.funding import RechargeRequest, RechargeResult, Status
from schemas.money import Money
from streams.consumer import Consumer
from streams.engine.kafka import connection
from streams.provision import BrokerAwayError
from streams.settings import Settings
from streams.testbed.kafka import started_producer

PAYMENTS: Final = UUID("5f2e9f0c-7a3c-5c0b-9c59-90f0f6f2a7d3")
SOURCE: Final = "payments-simulator"
# One of them is final: such a card is not asked again.
_CODES: Final = ("insufficient_funds", "do_not_honor", "card_velocity_exceeded", "lost_card")


class Behaviour(Struct, frozen=True, kw_only=True):
    """How the service behaves, in hundredths of all requests. What is neither declined, nor
    waiting for a person, nor never answered is settled."""

    seed: int = 1
    decline: int = 10
    needs_action: int = 0
    never: int = 0
    duplicate: int = 10
    reorder: int = 10
    delay_ms: int = 300


class Answer(Struct, frozen=True):
    """One result and how long after the request it is sent."""

    delay_ms: int
    result: RechargeResult


def answers(request: RechargeRequest, behaviour: Behaviour) -> list[Answer]:
    """Everything the service will say to a request, the same each time: also `occurred_at`
    follows from the request, or a repeated answer would contradict the first."""
    dice = random.Random(f"{behaviour.seed}/{request.recharge_id}")
    roll = dice.randrange(100)
    delay_ms = dice.randrange(behaviour.delay_ms + 1)
    code = None
    if roll < behaviour.never:
        return []
    if roll < behaviour.never + behaviour.decline:
        status, code = Status.DECLINED, dice.choice(_CODES)
    elif roll < behaviour.never + behaviour.decline + behaviour.needs_action:
        status = Status.NEEDS_ACTION
    else:
        status = Status.SUCCEEDED
    paid = status is Status.SUCCEEDED
    payment_id = str(uuid5(PAYMENTS, request.recharge_id))
    result = RechargeResult(
        result_id=f"{payment_id}/{status.value}",
        source=SOURCE,
        tenant_id=request.tenant_id,
        recharge_id=request.recharge_id,
        payment_id=payment_id,
        status=status,
        amount=Money(amount=request.amount, currency=request.currency) if paid else None,
        decline_code=code,
        occurred_at=request.requested_at + timedelta(milliseconds=delay_ms),
    )
    said = [Answer(delay_ms, result)]
    if dice.randrange(100) < behaviour.duplicate:
        # A second delivery under an id of its own: the ledger must still credit once.
        again = msgspec.structs.replace(result, result_id=f"{result.result_id}/again")
        said.append(Answer(delay_ms + dice.randrange(behaviour.delay_ms + 1), again))
    if dice.randrange(100) < behaviour.reorder and paid:
        # A decline of an earlier try that arrives around the success.
        decline = msgspec.structs.replace(
            result,
            result_id=f"{payment_id}/declined-late",
            payment_id=f"{payment_id}/0",
            status=Status.DECLINED,
            amount=None,
            decline_code=_CODES[0],
        )
        said.append(Answer(dice.randrange(2 * behaviour.delay_ms + 1), decline))
    return said


class Simulator:
    """The running service: a consumer group of its own, results keyed by tenant."""

    def __init__(self, settings: Settings, behaviour: Behaviour) -> None:
        self._settings = settings
        self._behaviour = behaviour
        self.requests = 0
        self.results = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Answer requests until told to stop; then send what is still delayed.

        Offsets are committed after the answers of a batch are acknowledged. Raises
        BrokerAwayError.
        """
        consumer = Consumer(
            self._settings.topics.of(topics.REQUESTED),
            **connection(self._settings),
            group_id=f"{self._settings.app_id}-payments-sim",
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        try:
            await consumer.start()
        except (KafkaError, OSError):
            await consumer.stop()
            raise BrokerAwayError(self._settings.broker) from None
        try:
            producer = await started_producer(self._settings)
        except BrokerAwayError:
            await consumer.stop()
            raise
        try:
            while not stop.is_set():
                fetched = await consumer.getmany(timeout_ms=200)
                requests = [
                    msgspec.json.decode(record.value, type=RechargeRequest)
                    for records in fetched.values()
                    for record in records
                ]
                if not requests:
                    continue
                self.requests += len(requests)
                said = [
                    answer for request in requests for answer in answers(request, self._behaviour)
                ]
                await self._send(producer, said)
                await consumer.commit()
        finally:
            await producer.stop()
            await consumer.stop()

    async def _send(self, producer: Any, said: list[Answer]) -> None:
        waited_ms = 0
        for answer in sorted(said, key=lambda one: one.delay_ms):
            if answer.delay_ms > waited_ms:
                await asyncio.sleep((answer.delay_ms - waited_ms) / 1000)
                waited_ms = answer.delay_ms
            result = answer.result
            await producer.send_and_wait(
                self._settings.topics.of(topics.RESULT),
                key=(result.tenant_id or "").encode(),
                value=_without_nulls(result),
                headers=binary_headers(
                    topics.RESULT, source=SOURCE, event_id=result.result_id or ""
                ),
            )
            self.results += 1


def _without_nulls(result: RechargeResult) -> bytes:
    members = msgspec.to_builtins(result)
    return orjson.dumps({name: value for name, value in members.items() if value is not None})
