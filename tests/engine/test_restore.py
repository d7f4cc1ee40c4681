"""What a restore takes for a loss, and what for somebody else's batch."""

import json
import random
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition

from schemas import topics
from streams.billing.account import encode_row
from streams.billing.parts import microseconds
from streams.engine import identity, restore, seen
from streams.engine.errors import FencedError, Stop, StoppedError, UnknownOutcomeError
from streams.engine.position import encode_position, marked
from streams.engine.restore import Marks, Restored
from streams.engine.rows import POSITION_KEY, Rows, Totals
from streams.engine.transaction import BARRIER_KEY
from streams.settings import Settings
from tests.billing.builders import NOW, an_account
from tests.simulation import clients
from tests.simulation.clients import NETWORK, Network
from tests.simulation.log import Broker, Partition

# Where changelog and ids end at first; what is asked later adds to it.
ENDS = 10


class Growing(Marks):
    """Logs that grow by so much with each question after the first."""

    def __init__(self, settings: Settings, grown: list[tuple[int, int]]) -> None:
        super().__init__(settings)
        self._names = (settings.topics.of(topics.CHANGELOG), settings.topics.of(topics.SEEN))
        self._grown = [(0, 0), *grown]

    async def refresh(self) -> None:
        """Nobody else to ask."""

    async def ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        grown = self._grown.pop(0) if len(self._grown) > 1 else self._grown[0]
        by_name = dict(zip(self._names, grown, strict=True))
        return {tp: ENDS + by_name.get(tp.topic, 0) for tp in tps}

    async def stable_ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, ENDS)


@pytest.mark.parametrize(
    ("grown", "raised"),
    [
        ([(0, 0)], StoppedError),
        ([(1, 1)], FencedError),
        # A batch reaches its logs one by one: its ids may be there before its rows.
        ([(0, 1), (0, 1), (1, 1)], FencedError),
        ([(0, 1)], UnknownOutcomeError),
    ],
)
async def test_what_looks_lost_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, grown: list[tuple[int, int]], raised: type[Exception]
) -> None:
    async def lost(*_: Any) -> Any:
        raise StoppedError(Stop.STATE_LOST, "rows are missing")

    monkeypatch.setattr(restore, "_read", lost)
    monkeypatch.setattr(restore, "_ASKED_EVERY_S", 0)
    settings = Settings(partitions=1)
    with pytest.raises(raised):
        await restore.restore(settings, 0, Growing(settings, grown), {}, NOW)


# -- logs that have lost something -----------------------------------------------------------------


class Logs:
    """The logs of one partition on the model of Kafka, as batches of it have filled them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings(partitions=1)
        self.broker = Broker()
        self.network = Network(self.broker, random.Random(1))
        NETWORK.set(self.network)
        monkeypatch.setattr(restore, "log_reader", clients.restore_reader)
        self.rows = Rows()
        self.position = Totals().position(now=NOW, sources={}, seen_next=0)

    def log(self, topic: str) -> Partition:
        return self.broker.partition(TopicPartition(self.settings.topics.of(topic), 0))

    def write(self, written: dict[str, list[tuple[bytes, bytes | None]]], *, commit: bool) -> None:
        """A transaction of the partition's owner."""
        name = self.settings.transactional_id(0)
        identity = self.broker.init_producer(name)
        tps = {topic: TopicPartition(self.settings.topics.of(topic), 0) for topic in written}
        self.broker.add_partitions(name, *identity, tps.values())
        for topic, records in written.items():
            contents = [(key, value, (), 0) for key, value in records]
            self.broker.append_in_transaction(name, *identity, tps[topic], contents, 0)
        self.broker.end_transaction(name, *identity, commit=commit)

    def book(
        self,
        tenant: str = "t-1",
        seq: int = 1,
        *,
        day: float = 0,
        ids: bool = True,
        ledger_from: int = 0,
    ) -> None:
        """A batch with an entry, its row and, unless told otherwise, an id."""
        now = NOW + timedelta(days=day)
        key, row = tenant.encode(), encode_row(an_account().changed(tenant_id=tenant, seq=seq))
        self.rows.put(key, row)
        ordinal, seen_marks = self.position.seen_next, self.position.seen_marks
        written: dict[str, list[tuple[bytes, bytes | None]]] = {}
        if ids:
            packed = seen.pack(
                ordinal=ordinal,
                ledger_from=ledger_from,
                now_us=0,
                fingerprints=[ordinal + 1],
                checks=[7],
                weeks=[identity.week_of(now)],
            )
            written[topics.SEEN] = [(b"ids", packed)]
            seen_marks = marked(seen_marks, ordinal, microseconds(now))
        rows, digest = self.rows.totals()
        self.position = msgspec.structs.replace(
            self.position,
            now=now,
            rows=rows,
            digest=f"{digest:016x}",
            seen_next=ordinal + ids,
            seen_marks=seen_marks,
        )
        written[topics.LEDGER] = [(key, b'{"tenant_id":"%b","seq":%d}' % (key, seq))]
        written[topics.CHANGELOG] = [(key, row), (POSITION_KEY, encode_position(self.position))]
        self.write(written, commit=True)

    def barriers(self, count: int) -> None:
        """Openings that came to nothing, or after which nothing was booked."""
        for _ in range(count):
            barrier = {topic: [(BARRIER_KEY, None)] for topic in (topics.CHANGELOG, topics.LEDGER)}
            self.write(barrier, commit=False)  # type: ignore[arg-type]

    async def restored(self, day: float | None = None) -> Restored:
        """What a restore finds, so many days after the first batch; the last one's day, if not."""
        now = self.position.now if day is None else NOW + timedelta(days=day)
        marks = Marks(self.settings)
        await marks.start()
        return await restore.restore(self.settings, 0, marks, {}, now)

    async def lost(self, day: float | None = None) -> str:
        """What the loss is called that a restore finds."""
        with pytest.raises(StoppedError) as caught:
            await self.restored(day)
        assert caught.value.reason is Stop.STATE_LOST
        return str(caught.value)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Logs:
    monkeypatch.setattr(restore, "_ASKED_EVERY_S", 0)
    return Logs(monkeypatch)


async def test_ids_that_are_all_there_are_restored(logs: Logs) -> None:
    for seq in range(1, 7):
        logs.book(seq=seq)
    assert len((await logs.restored()).seen) == 6


@pytest.mark.parametrize("left", [0, 3])
async def test_ids_cut_off_from_the_front_are_a_loss_while_they_are_young(
    logs: Logs, left: int
) -> None:
    for seq in range(1, 7):
        logs.book(seq=seq)
    ids = logs.log(topics.SEEN)
    ids.delete_before(ids.end - 2 * left)
    for day in (0, 35, 42.9):
        assert "remembered ids are missing" in await logs.lost(day)


async def test_ids_that_are_retired_are_no_loss(logs: Logs) -> None:
    for seq, day in enumerate((0, 1, 8, 9, 30, 38, 46), start=1):
        logs.book(seq=seq, day=day)
    ids = logs.log(topics.SEEN)
    # The mark of day 0 is past its time, so what is before that of day 8 may go.
    ids.delete_before(2 * 2)
    assert len((await logs.restored(46)).seen) > 0
    # What comes after that may not yet.
    ids.delete_before(3 * 2)
    assert "remembered ids are missing" in await logs.lost(46)
    await logs.restored(8 + 43)
    ids.delete_before(ids.end)
    assert "remembered ids are missing" in await logs.lost(46 + 42)
    assert len((await logs.restored(46 + 43)).seen) == 0


async def test_the_age_of_ids_is_told_by_the_later_of_two_clocks(logs: Logs) -> None:
    logs.book()
    logs.book(seq=2, day=44, ids=False)
    ids = logs.log(topics.SEEN)
    ids.delete_before(ids.end)
    assert len((await logs.restored(0)).seen) == 0


async def test_ids_lost_from_the_middle_are_a_loss_whatever_their_age(logs: Logs) -> None:
    for seq in range(1, 7):
        logs.book(seq=seq)
    del logs.log(topics.SEEN).records[4:6]
    assert "remembered ids are missing" in await logs.lost(100)


async def test_ids_lost_from_the_end_are_a_loss_whatever_their_age(logs: Logs) -> None:
    for seq in range(1, 7):
        logs.book(seq=seq)
    del logs.log(topics.SEEN).records[-2:]
    assert "remembered ids are missing" in await logs.lost(100)


async def test_an_id_log_made_anew_is_a_loss(logs: Logs) -> None:
    logs.book()
    ids = logs.log(topics.SEEN)
    ids.records, ids.end = [], 0
    assert "remembered ids are missing" in await logs.lost()


async def test_a_position_row_without_marks_is_still_believed(logs: Logs) -> None:
    logs.book()
    logs.book(seq=2)
    unmarked = json.loads(encode_position(logs.position))
    del unmarked["seen_marks"]
    logs.write({topics.CHANGELOG: [(POSITION_KEY, json.dumps(unmarked).encode())]}, commit=True)
    ids = logs.log(topics.SEEN)
    ids.delete_before(2)
    assert len((await logs.restored()).seen) == 1
    ids.delete_before(ids.end)
    assert len((await logs.restored()).seen) == 0


async def test_a_table_that_is_older_than_the_ledger_is_a_loss(logs: Logs) -> None:
    logs.book(seq=1)
    logs.book("t-2", seq=1)
    logs.book(seq=2)
    for topic in (topics.CHANGELOG, topics.SEEN):
        # A copy that is sound in itself: cut back to an earlier position row, ids and all.
        log = logs.log(topic)
        log.records = [one for one in log.records if one.offset < log.end // 3 * 2]
    text = await logs.lost()
    assert "t-1 has entry 2" in text
    assert "older than the ledger" in text


async def test_a_tenant_that_only_the_ledger_knows_is_a_loss(logs: Logs) -> None:
    logs.book(seq=1)
    logs.book("t-2", seq=1)
    for topic in (topics.CHANGELOG, topics.SEEN):
        log = logs.log(topic)
        log.records = [one for one in log.records if one.offset < log.end // 2]
    assert "t-2 has entry 1, the table none" in await logs.lost()


@pytest.mark.parametrize("openings", [0, 1, 40, 500])
async def test_openings_at_the_end_of_the_ledger_hide_no_loss_and_are_none(
    logs: Logs, openings: int
) -> None:
    logs.book(seq=1)
    logs.barriers(openings)
    assert (await logs.restored()).position == logs.position
    logs.book(seq=2)
    logs.barriers(openings)
    kept = [one for one in logs.log(topics.CHANGELOG).records if one.offset < 3]
    logs.log(topics.CHANGELOG).records = kept
    logs.log(topics.SEEN).records = logs.log(topics.SEEN).records[:2]
    assert "t-1 has entry 2, the table 1" in await logs.lost()


@pytest.mark.parametrize("openings", [0, 100])
async def test_a_ledger_whose_start_is_cut_is_read_as_far_as_it_is_there(
    logs: Logs, openings: int
) -> None:
    logs.book(seq=1)
    logs.barriers(openings)
    ledger = logs.log(topics.LEDGER)
    for cut in (0, 1, ledger.end):
        ledger.delete_before(cut)
        assert (await logs.restored()).position == logs.position


async def test_what_is_no_entry_says_nothing_of_the_table(logs: Logs) -> None:
    logs.book(seq=1)
    others: list[tuple[Any, Any]] = [(b"t-1", b"{broken"), (b"t-9", None), (None, b'{"seq":7}')]
    logs.write({topics.LEDGER: others}, commit=True)
    assert (await logs.restored()).position == logs.position


async def test_a_ledger_that_is_ahead_because_somebody_has_fenced_us_is_no_loss(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.book(seq=1)
    stable = Marks.stable_ends

    async def meanwhile(self: Marks, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        monkeypatch.setattr(Marks, "stable_ends", stable)
        # The new owner's batch is committed on the ledger, but not yet elsewhere.
        delays = {topics.SEEN: 60, topics.LEDGER: 0, topics.CHANGELOG: 60}
        logs.broker.marker_delay = iter(delays.values()).__next__
        before = await stable(self, tps)
        logs.book(seq=2)
        ledger = logs.log(topics.LEDGER)
        return before | {TopicPartition(ledger.topic, ledger.number): ledger.stable_end}

    monkeypatch.setattr(Marks, "stable_ends", meanwhile)
    with pytest.raises(FencedError):
        await logs.restored()
    assert logs.log(topics.LEDGER).end == logs.log(topics.LEDGER).stable_end == 4


async def test_rows_of_tenants_that_belong_elsewhere_stop_by_name(logs: Logs) -> None:
    for number in range(20):
        logs.book(tenant=f"t-{number}")
    assert len((await logs.restored()).rows.values) == 20
    # Somebody has added partitions to all topics, and told the workers.
    logs.settings = msgspec.structs.replace(logs.settings, partitions=2)
    with pytest.raises(StoppedError, match="of 2 partitions it belongs to 1") as caught:
        await logs.restored()
    assert caught.value.reason is Stop.NOT_COPARTITIONED


@pytest.mark.parametrize(("ledger_from", "lost"), [(4, False), (5, True)])
async def test_a_ledger_made_anew_with_other_offsets_is_a_loss(
    logs: Logs, ledger_from: int, lost: bool
) -> None:
    """Two entries, each with the end of its transaction."""
    logs.book(seq=1)
    logs.book(seq=2, ledger_from=ledger_from)
    if lost:
        assert "ends at 4, but the remembered ids name entries from 5 on" in await logs.lost()
    else:
        assert len((await logs.restored()).seen) == 2
