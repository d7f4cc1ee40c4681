"""Original entries: what a correction takes back, read from the ledger before its batch is decided.

The remembered id of the corrected event tells in which batch it was booked, and that batch's
entries stand in a narrow range of our own partition of the ledger. Only corrections come here.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError
from msgspec import Struct

from schemas.ledger import LedgerEntry
from schemas.usage import Phase
from streams.billing.events import UsageEvent
from streams.consumer import Consumer
from streams.engine.errors import UnknownOutcomeError
from streams.engine.identity import corrected, fingerprint
from streams.engine.kafka import log_reader
from streams.engine.restore import records_of
from streams.engine.seen import Seen
from streams.engine.work import Candidate
from streams.settings import Settings

# Longer than a commit's markers can be late.
READ_WITHIN_S: Final = 20
_ASKED_EVERY_S: Final = 0.1

# (source, id) of an event.
Identity = tuple[str, str]
# Offsets of the ledger, the second excluded.
Range = tuple[int, int]


class _Cause(Struct):
    source: str
    id: str


class _Caused(Struct):
    """As much of an entry as says whose it is; what newer versions write is nothing to us."""

    caused_by: _Cause


_decode_cause: Final = msgspec.json.Decoder(_Caused).decode
_decode_entry: Final = msgspec.json.Decoder(LedgerEntry).decode


class Wanted(Struct):
    """What the corrections among some records need. `ranges` is where the entries of corrected
    events stand; `cut` is the place of the first correction whose original is in this very batch:
    the batch must end before it."""

    ranges: dict[Identity, Range]
    cut: int | None = None


def wanted_by(
    candidates: Sequence[Candidate],
    known: Mapping[int, int],
    fresh: Mapping[int, int],
    seen: Seen,
    ledger_end: int,
) -> Wanted:
    """Look up what corrections name. `known` are the places of repeats, `fresh` the fingerprints
    of this batch so far."""
    wanted = Wanted({})
    earlier: set[int] = set()
    for at, candidate in enumerate(candidates):
        event = candidate.event
        if (
            isinstance(event, UsageEvent)
            and event.phase is Phase.CORRECTION
            and event.corrects is not None
            and at not in known
            and candidate.fingerprint not in fresh
        ):
            identity = (event.cause.source, event.corrects)
            named = fingerprint(*identity)
            ordinal = seen.ordinal_of(named)
            if ordinal is not None:
                if seen.ordinal_of(corrected(*identity)) is None:
                    wanted.ranges[identity] = seen.ledger_range(ordinal, ledger_end)
            elif named in fresh or named in earlier:
                wanted.cut = at
                return wanted
        earlier.add(candidate.fingerprint)
    return wanted


class Originals:
    """Reads entries of events from the ledger, with one consumer for all shards of a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: Consumer | None = None
        self._turn = asyncio.Lock()

    async def stop(self) -> None:
        """Disconnect."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()

    async def read(
        self, tp: TopicPartition, ranges: Mapping[Identity, Range]
    ) -> dict[Identity, tuple[LedgerEntry, ...]]:
        """The entries that events have caused, in their order; none of an event that cost nothing.
        Events whose entries are gone from the ledger are left out.

        Raises UnknownOutcomeError and KafkaError when the ledger cannot be read now.
        """
        found: dict[Identity, tuple[LedgerEntry, ...]] = dict.fromkeys(ranges, ())
        try:
            async with asyncio.timeout(READ_WITHIN_S), self._turn:
                sound = False
                try:
                    for first, end in merged(ranges.values()):
                        await self._read_or_forget(tp, first, end, ranges, found)
                    sound = True
                finally:
                    if not sound:
                        await self.stop()
        except TimeoutError as error:
            raise UnknownOutcomeError("the ledger cannot be read") from error
        return found

    async def _read_or_forget(
        self,
        tp: TopicPartition,
        first: int,
        end: int,
        ranges: Mapping[Identity, Range],
        found: dict[Identity, tuple[LedgerEntry, ...]],
    ) -> None:
        inside = [identity for identity, (start, _) in ranges.items() if first <= start < end]
        while True:
            found.update(dict.fromkeys(inside, ()))
            try:
                await self._read(tp, first, end, found)
                return
            except OffsetOutOfRangeError:
                if await self._start(tp) > first:
                    break
            # A replica that lags, or leads no more, says so of what it does not have yet.
            await asyncio.sleep(_ASKED_EVERY_S)
        # The ledger is kept for ever; where it is not, nobody can take back what nobody can read.
        for identity in inside:
            del found[identity]

    async def _start(self, tp: TopicPartition) -> int:
        """Where a log begins, asked of its leader, whoever that is by now."""
        consumer = await self._connected()
        await consumer._client.force_metadata_update()  # noqa: SLF001  # a contract test watches it
        starts = await consumer.beginning_offsets([tp])
        return int(starts[tp])

    async def _read(
        self,
        tp: TopicPartition,
        first: int,
        end: int,
        found: dict[Identity, tuple[LedgerEntry, ...]],
    ) -> None:
        consumer = await self._connected()
        consumer.assign([tp])
        consumer.seek(tp, first)
        try:
            async for _, records in records_of(consumer, {tp: end}):
                for record in records:
                    if record.offset < end:
                        _keep(record.value, found)
                await asyncio.sleep(0)
        finally:
            # It would go on fetching what nobody asks for.
            consumer.unsubscribe()

    async def _connected(self) -> Consumer:
        if self._consumer is None:
            consumer = log_reader(self._settings)
            try:
                await consumer.start()
            except BaseException:
                await consumer.stop()
                raise
            self._consumer = consumer
        return self._consumer


def _keep(value: Any, found: dict[Identity, tuple[LedgerEntry, ...]]) -> None:
    cause = _decode_cause(value).caused_by
    identity = (cause.source, cause.id)
    if identity in found:
        found[identity] += (_decode_entry(value),)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch as one."""
    found: list[Range] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found
