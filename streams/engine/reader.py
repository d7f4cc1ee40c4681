"""The reader: fetches whole slices of the source partitions whose shards are open.

The chain. Every slice carries the offset it follows on from: the seek target, or the end of the
slice before it. A shard takes a slice only when that is not past its own position; so a slice
that was lost on the way (Faust clears the agents' buffers in a rebalance) shows in the next one.
The stamps are true because `getmany` drains its buffers and returns without yielding, and there
is no `await` between its return and the stamping.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import TopicPartition
from msgspec import Struct
from msgspec.structs import replace

from streams.engine.kafka import log_reader
from streams.settings import Settings

# More of a partition would only sit in memory: a spike without a bound took 865 MB. Many small
# slices are no more than one large one: under a steady load every fetch brings a few records, and
# one that must wait for room holds up all partitions of its broker.
SLICES_IN_FLIGHT: Final = 4
SMALL_SLICES_IN_FLIGHT: Final = 64
FULL_BYTES: Final = 1 << 20
_RECORD_BYTES: Final = 100
_WEIGHED: Final = 64
_ROOM_WAIT_MS: Final = 200
# While records come, the broker collects for a moment: a fetch of all partitions for each record
# would cost more than booking it. The first one after a silence is handed out at once.
_COLLECT_BYTES: Final = 128 << 10
_COLLECT_MS: Final = 25
_SILENCE_MS: Final = 500


class Slice(Struct, frozen=True, eq=False):
    """Consecutive records of one source partition, as fetched.

    `follows` is the offset the slice follows on from and `end` the one the next slice will;
    `epoch` and `seek` tell slices of an older assignment or seek apart; `size` is about
    the bytes it takes.
    """

    tp: TopicPartition
    records: Sequence[Any]
    epoch: int
    seek: int
    follows: int
    end: int
    size: int = 0


def split(part: Slice, offset: int) -> tuple[list[Slice], Slice]:
    """What of a slice comes before an offset, if anything does, and the rest."""
    before = [record for record in part.records if record.offset < offset]
    rest = replace(
        part, records=[one for one in part.records if one.offset >= offset], follows=offset
    )
    return [replace(part, records=before, end=offset)] if before else [], rest


def _size_of(records: Sequence[Any]) -> int:
    """About the bytes some records take: of many, one in so many is weighed for all."""
    step = len(records) // _WEIGHED + 1
    weighed = records[::step]
    size = sum(_RECORD_BYTES + len(record.value or b"") for record in weighed)
    return size * len(records) // len(weighed)


def _has_room(sizes: Mapping[int, int]) -> bool:
    """Whether more of a partition may be fetched beside these slices in flight."""
    small = sum(sizes.values()) < FULL_BYTES
    return len(sizes) < (SMALL_SLICES_IN_FLIGHT if small else SLICES_IN_FLIGHT)


class Reader:
    """Reads source partitions from given offsets, in epochs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: Any = None
        self._epoch = 0
        self._seeks: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        # Bytes by where they end: one that comes twice is still one.
        self._in_flight: dict[TopicPartition, dict[int, int]] = {}
        self._held: set[TopicPartition] = set()
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Connect."""
        self._consumer = log_reader(self._settings)
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:  # the broker may be gone before it was ever there
            await self._consumer.stop()

    @property
    def epoch(self) -> int:
        """The current epoch; slices of any other are void."""
        return self._epoch

    def in_flight(self, tp: TopicPartition) -> int:
        """Slices fetched and neither booked nor dropped."""
        return len(self._in_flight.get(tp, ()))

    def begin(self, positions: Mapping[TopicPartition, int], held: set[TopicPartition]) -> None:
        """Begin a new epoch: read these partitions from these offsets and no others.

        `held` are not handed out until `release_held`. Every slice in flight becomes void.
        """
        self._epoch += 1
        self._ends = dict(positions)
        self._in_flight = {tp: {} for tp in positions}
        self._held = set(held)
        self._seeks = {tp: self._seeks.get(tp, 0) + 1 for tp in positions}
        if positions:
            # What the broker was asked before it answers first, and shards open one after another.
            self._pace(busy=True)
            self._consumer.assign(list(positions))
            for tp, offset in positions.items():
                self._consumer.seek(tp, offset)
        else:
            self._consumer.unsubscribe()
        self._changed.set()

    def release_held(self, tps: Sequence[TopicPartition]) -> None:
        """Hand out these partitions from now on."""
        self._held.difference_update(tps)
        self._changed.set()

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read a partition again from an offset; what is in flight of it becomes void."""
        if tp not in self._ends:
            return
        self._seeks[tp] += 1
        self._ends[tp] = offset
        self._in_flight[tp] = {}
        self._consumer.seek(tp, offset)
        self._changed.set()

    def current(self, part: Slice) -> bool:
        """Whether a slice belongs to this epoch and to the last seek of its partition."""
        return part.epoch == self._epoch and part.seek == self._seeks.get(part.tp)

    def done(self, part: Slice) -> None:
        """A slice is booked or dropped: make room for the next."""
        if self.current(part):
            self._in_flight[part.tp].pop(part.end, None)
            self._changed.set()

    async def read_up_to(self, tp: TopicPartition) -> int:
        """How far a partition is read when nothing of it is in flight, control records at the
        log's end included (they never come as records); −1 when it is not read or in flight."""
        if tp not in self._ends or self._in_flight[tp]:
            return -1
        return int(await self._consumer.position(tp))

    async def fetch(self) -> list[Slice]:
        """The next slices, those of a topic beside each other, or none after a short wait.

        Raises what aiokafka raises, OffsetOutOfRangeError included: nothing resets by itself.
        """
        room = [
            tp for tp, sizes in self._in_flight.items() if tp not in self._held and _has_room(sizes)
        ]
        if not room:  # getmany without partitions would mean all of them
            self._changed.clear()
            try:
                async with asyncio.timeout(_ROOM_WAIT_MS / 1000):
                    await self._changed.wait()
            except TimeoutError:
                return []
            return []
        # One that waits for room, or for commands, must not wait for the silence of the others.
        all_of_them = len(room) == len(self._in_flight)
        fetched = await self._consumer.getmany(
            *room, timeout_ms=_SILENCE_MS if all_of_them else _COLLECT_MS
        )
        # No await from here to the end: the stamps must describe the moment of the fetch.
        slices = []
        for tp, records in sorted(fetched.items()):
            if not records or tp not in self._ends:
                continue
            follows, end = self._ends[tp], records[-1].offset + 1
            size = _size_of(records)
            self._ends[tp] = end
            self._in_flight[tp][end] = size
            slices.append(Slice(tp, records, self._epoch, self._seeks[tp], follows, end, size))
        self._pace(busy=bool(slices) or not all_of_them)
        return slices

    def _pace(self, *, busy: bool) -> None:
        """How long the broker may collect for the fetches that are sent from now on."""
        fetcher = self._consumer._fetcher  # noqa: SLF001  # a contract test watches the names
        fetcher._fetch_min_bytes = _COLLECT_BYTES if busy else 1  # noqa: SLF001
        fetcher._fetch_max_wait_ms = _COLLECT_MS if busy else _SILENCE_MS  # noqa: SLF001
