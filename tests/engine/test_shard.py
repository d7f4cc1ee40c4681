"""A shard without a broker: batches are decided and believed to be committed."""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from random import Random
from time import monotonic
from typing import Any

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError
from aiokafka.structs import ConsumerRecord
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from schemas import topics
from schemas.nanos import NANOS
from streams.billing import holds
from streams.billing.account import Account, encode_row
from streams.billing.events import UsageEvent
from streams.billing.legs import usage_event
from streams.billing.parts import microseconds
from streams.billing.rates import Decks, Rate, Tariff
from streams.engine import batch, originals, shard
from streams.engine.errors import GaveUpError, UnknownOutcomeError
from streams.engine.lag import Lag
from streams.engine.originals import Originals
from streams.engine.position import SourcePosition, decode_position, encode_position
from streams.engine.reader import Slice
from streams.engine.record_batch import NO_HEADERS, RecordBatch
from streams.engine.restore import Marks
from streams.engine.rows import (
    HOLD_MARK,
    POSITION_KEY,
    Totals,
    due_of,
    owner_of,
)
from streams.engine.shard import TELL_OFFSETS_EVERY_S, Shard
from streams.engine.work import Work
from streams.metrics import Meters
from streams.settings import Settings
from tests.batches import records_of
from tests.billing.builders import NOW, a_grant, a_result, opening, settings, some_terms
from tests.billing.test_recharge import _policy as a_policy

TENANT = b"t-1"
HOUR = timedelta(hours=1)


class Recorded:
    """Outputs of a batch, as lists by topic."""

    def __init__(self) -> None:
        self.by_topic: dict[str, list[tuple[bytes | None, bytes | None, dict[str, bytes]]]] = {}

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: bytes = NO_HEADERS,
    ) -> None:
        batch = RecordBatch(0, 1_000_000)
        assert batch.add(key, value, headers)
        [record] = records_of(batch)
        self.by_topic.setdefault(topic, []).append((key, value, dict(record.headers)))


class Entries(Originals):
    """The ledger as a list; what was read of it."""

    def __init__(self, options: Settings) -> None:
        super().__init__(options)
        self.values: list[bytes] = []
        self.reads: list[tuple[int, int]] = []
        self.troubles: list[Exception] = []
        self.begins = 0

    async def _read(self, tp: TopicPartition, first: int, end: int, found: Any) -> None:
        self.reads.append((first, end))
        for value in self.values[first:end]:
            originals._keep(value, found)
        if self.troubles:
            raise self.troubles.pop(0)

    async def _start(self, tp: TopicPartition) -> int:
        return self.begins


class Bench:
    """One shard of one partition, its clock, and what it has written."""

    def __init__(self) -> None:
        self.now = NOW
        self.left: list[Slice] = []
        # What the records that come bear.
        self.headers: list[tuple[str, bytes]] = []
        self.meters = Meters(CollectorRegistry())
        options = Settings(partitions=1)
        self.ledger = Entries(options)
        self.shard = Shard(
            options,
            0,
            marks=Marks(options),
            originals=self.ledger,
            meters=self.meters,
            terms=some_terms(),
            accepted_losses={},
            wall=lambda: self.now,
        )
        self.shard._transactor.outputs = lambda _: Recorded()  # type: ignore[assignment, method-assign, return-value]
        for name in topics.SOURCES:
            self.shard._sources[name] = SourcePosition(next=0)
        self.lag(0)

    def lag(self, seconds: float) -> None:
        """Let the shard be that far behind."""
        self.shard.lag = Lag(monotonic() - seconds)

    def slice(self, topic: str, *values: Any, keys: Sequence[bytes] = ()) -> Slice:
        """Records that follow what is booked."""
        first = self.shard.next_of(topic)
        records = [
            ConsumerRecord(topic, 0, first + at, 0, 0, key, _bytes(value), None, 0, 0, self.headers)
            for at, (value, key) in enumerate(
                zip(values, keys or [TENANT] * len(values), strict=True)
            )
        ]
        return Slice(TopicPartition(topic, 0), records, 0, 0, first, first + len(records))

    async def book(self, topic: str | None = None, *values: Any) -> Recorded:
        """Decide a batch and publish it, as after a commit."""
        slices = self.left if topic is None else [self.slice(topic, *values)]
        work: Work = await self.shard._decide(slices)
        if work.position is not None:
            self.shard._publish(work)
        work.tally.publish(self.meters)
        outputs: Any = work.outputs
        assert isinstance(outputs, Recorded)
        self.left = work.left
        written = outputs.by_topic.get(topics.LEDGER, [])
        self.ledger.values += [value or b"" for _, value, _ in written]
        self.shard._ledger_end = len(self.ledger.values)
        return outputs

    def metric(self, name: str, **labels: str) -> float | None:
        return self.meters.registry.get_sample_value(name, labels)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else msgspec.json.encode(value)


def requests_of(outputs: Recorded) -> list[dict[str, Any]]:
    written = outputs.by_topic.get(topics.REQUESTED, ())
    return [json.loads(value or b"") for _, value, _ in written]


def withheld_in(outputs: Recorded) -> list[str]:
    notices = [json.loads(value or b"") for _, value, _ in outputs.by_topic[topics.NOTIFICATION]]
    return [one["withheld"] for one in notices if "withheld" in one]


def a_call(number: int, **changes: Any) -> dict[str, Any]:
    """A call of one dollar."""
    return {
        "event_id": f"e-{number}",
        "source": "pbx",
        "tenant_id": "t-1",
        "kind": "international",
        "call_id": "c",
        "callee": "+442079460018",
        "started_at": (NOW - timedelta(minutes=2)).isoformat(),
        "duration_s": 60,
    } | changes


@pytest.fixture
async def bench() -> Bench:
    """An open tenant with 100 dollars that recharges below 100."""
    bench = Bench()
    policy: Any = a_policy(trigger="100", amount="200")
    commands = [opening(opening_balance="100"), settings(0, policy=policy)]
    named = [
        msgspec.structs.replace(command, command_id=f"c-{at}")
        for at, command in enumerate(commands)
    ]
    await bench.book(topics.COMMAND, *named)
    return bench


@pytest.mark.parametrize("traced", [[], [("traceparent", b"00-1-2-01"), ("tracestate", b"a=b")]])
async def test_headers_have_one_order_and_a_trace_travels_on(
    bench: Bench, traced: list[tuple[str, bytes]]
) -> None:
    bench.headers = [("other", b"not told"), *traced]
    outputs = await bench.book(topics.CALL_USAGE, a_call(1))

    def headers_of(topic: str) -> list[tuple[str, bytes]]:
        [(_, _, headers)] = outputs.by_topic[topic]
        assert [*headers.items()][:4] == [
            ("ce_specversion", b"1.0"),
            ("content-type", b"application/json"),
            ("ce_type", topic.encode()),
            ("ce_source", b"credits"),
        ]
        return [*headers.items()][4:]

    cause = ("credits-caused-by", b"pbx/e-1")
    [(_, value, _)] = outputs.by_topic[topics.BALANCE]
    seq = json.loads(value or b"")["seq"]
    assert headers_of(topics.LEDGER) == [("ce_id", b"t-1/%d" % seq), cause, *traced]
    now_us = microseconds(bench.shard.last_now)
    assert headers_of(topics.BALANCE) == [("ce_id", b"t-1/%d/%d" % (seq, now_us))]
    [request] = requests_of(outputs)
    expires_us = microseconds(datetime.fromisoformat(request["expires_at"]))
    request_id = f"{request['recharge_id']}/{expires_us}".encode()
    assert headers_of(topics.REQUESTED) == [("ce_id", request_id), cause, *traced]


async def test_a_shard_that_is_not_behind_asks_at_once(bench: Bench) -> None:
    assert len(requests_of(await bench.book(topics.CALL_USAGE, a_call(1)))) == 1


async def test_a_shard_that_is_behind_withholds_and_asks_when_it_has_caught_up(
    bench: Bench,
) -> None:
    bench.lag(61)
    outputs = await bench.book(topics.CALL_USAGE, a_call(1), a_call(2))
    assert requests_of(outputs) == []
    assert withheld_in(outputs) == ["stale"]
    assert not bench.shard.stale_waits()
    bench.lag(1)
    assert bench.shard.stale_waits()
    outputs = await bench.book()
    assert [one["balance"] for one in requests_of(outputs)] == ["98"]
    assert not bench.shard.stale_waits()


async def test_money_that_came_meanwhile_leaves_nothing_to_ask_for(bench: Bench) -> None:
    bench.lag(61)
    await bench.book(topics.CALL_USAGE, a_call(1))
    payment = a_result("elsewhere", amount="50").result
    named = msgspec.structs.replace(payment, result_id="r-1")
    await bench.book(topics.RESULT, named)
    bench.lag(0)
    assert not bench.shard.stale_waits()


async def test_what_was_stale_before_a_restart_is_asked_for_after_it(bench: Bench) -> None:
    bench.lag(61)
    await bench.book(topics.CALL_USAGE, a_call(1))
    bench.lag(0)
    bench.shard.remember_recharges()
    assert bench.shard.stale_waits()
    assert len(requests_of(await bench.book())) == 1


async def test_only_tenants_rows_are_read_for_what_is_in_flight(bench: Bench) -> None:
    payment = a_result("elsewhere", amount="50").result
    named = msgspec.structs.replace(payment, result_id="r-1", payment_id="stale or requested")
    await bench.book(topics.RESULT, named)
    bench.shard.remember_recharges()
    assert not bench.shard.stale_waits()


async def test_a_recharge_in_flight_ages_and_its_duration_is_measured(bench: Bench) -> None:
    assert bench.shard.oldest_request_s() == 0
    [request] = requests_of(await bench.book(topics.CALL_USAGE, a_call(1)))
    bench.now = bench.shard.last_now + timedelta(minutes=5)
    assert bench.shard.oldest_request_s() == 300
    bench.shard.remember_recharges()
    assert bench.shard.oldest_request_s() == 300
    answer = a_result(request["recharge_id"], amount="200").result
    await bench.book(topics.RESULT, msgspec.structs.replace(answer, result_id="r-1"))
    assert bench.shard.oldest_request_s() == 0
    assert bench.metric("credits_recharge_duration_seconds_count") == 1
    assert bench.metric("credits_recharge_duration_seconds_sum") == 300


@pytest.mark.parametrize(
    ("code", "decline_class"),
    [
        ("insufficient_funds", "retryable"),
        (None, "retryable"),
        ("fraud", "terminal"),
        ("expired_card", "expired_card"),
    ],
)
async def test_answers_are_counted_with_the_class_of_their_decline(
    bench: Bench, code: str | None, decline_class: str
) -> None:
    [request] = requests_of(await bench.book(topics.CALL_USAGE, a_call(1)))
    answer = a_result(request["recharge_id"], "declined", decline_code=code).result  # type: ignore[arg-type]
    await bench.book(topics.RESULT, msgspec.structs.replace(answer, result_id="r-1"))
    name = "credits_recharge_results_total"
    assert bench.metric(name, result="declined", decline_class=decline_class) == 1
    assert bench.metric(name, result="succeeded", decline_class="none") == 0


async def test_entries_and_rows_do_not_drift_apart_and_it_would_show(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    assert bench.shard.drift_nanos == {"USD": 0}

    def twice(totals: Totals, _: Account | None, after: Account) -> None:
        sound(totals, None, after)

    sound = Totals.tenant
    monkeypatch.setattr(Totals, "tenant", twice)
    await bench.book(topics.CALL_USAGE, a_call(2))
    assert bench.shard.drift_nanos["USD"] != 0


def letters_in(outputs: Recorded) -> list[tuple[int, str]]:
    written = outputs.by_topic[topics.dead_letters_of(topics.CALL_USAGE)]
    return [
        (int(headers["credits-dlq-offset"]), headers["credits-dlq-reason"].decode())
        for _, _, headers in written
    ]


async def test_dead_letters_of_a_batch_stand_in_the_order_of_their_records(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    outputs = await bench.book(
        topics.CALL_USAGE,
        a_call(2, callee="+999"),
        b"{",
        a_call(1, duration_s=61),
        a_call(3, started_at="2020-01-01T00:00:00Z"),
        a_call(4, currency="EUR"),
        a_call(5, duration_s=-1, callee=7),
    )
    assert letters_in(outputs) == [
        (1, "unrated"),
        (2, "malformed_json"),
        (3, "conflict"),
        (4, "too_late"),
        (5, "currency_mismatch"),
        (6, "schema_violation"),
    ]
    last = outputs.by_topic[topics.dead_letters_of(topics.CALL_USAGE)][-1]
    assert sorted(last[2]["credits-dlq-path"].split()) == [b"$.callee", b"$.duration_s"]


@pytest.mark.parametrize("topic", [topics.CALL_USAGE, topics.COMMAND])
async def test_an_id_that_comes_again_for_another_tenant_is_a_conflict(
    bench: Bench, topic: str
) -> None:
    """Also when nothing else differs: it was never charged, and is no repeat."""
    command = {"command": "adjustment", "command_id": "x", "source": "cli", "reason": "why",
               "issued_at": NOW.isoformat(), "issued_by": "me",
               "amount": {"amount": "20", "currency": "USD"}}  # fmt: skip
    value = a_call(1) if topic == topics.CALL_USAGE else command
    other = json.loads(json.dumps(value).replace("t-1", "t-2"))
    opened = {"command": "open_tenant", "command_id": "o", "source": "cli", "currency": "USD",
              "billing_from": NOW.isoformat()}  # fmt: skip
    bench.left = [bench.slice(topics.COMMAND, opened, keys=[b"t-2"])]
    await bench.book()
    await bench.book(topic, value)
    bench.left = [bench.slice(topic, other, keys=[b"t-2"])]
    outputs = await bench.book()
    [(key, _, headers)] = outputs.by_topic[topics.dead_letters_of(topic)]
    assert (key, headers["credits-dlq-reason"]) == (b"t-2", b"conflict")


async def test_the_group_is_told_offsets_now_and_then_and_at_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, int]] = []

    async def commit(_: Any, offsets: dict[TopicPartition, int]) -> dict[tuple[str, int], int]:
        told.append({tp.topic: offset for tp, offset in offsets.items()})
        return {}

    async def stop() -> None:
        told.append({})

    shard = bench.shard
    monkeypatch.setattr(shard._transactor, "commit", commit)
    monkeypatch.setattr(shard._transactor, "stop", stop)
    await shard._book([bench.slice(topics.CALL_USAGE, a_call(1))])
    await shard._book([bench.slice(topics.CALL_USAGE, a_call(2), a_call(3))])
    assert told == [{topics.COMMAND: 2, topics.CALL_USAGE: 1}, {}]

    shard._told_at -= TELL_OFFSETS_EVERY_S
    await shard._book([])
    await shard._book([])
    assert told[2:] == [{topics.CALL_USAGE: 3}]

    await shard._book([bench.slice(topics.CALL_USAGE, a_call(4))])
    await shard.stop()
    assert told[3:] == [{}, {topics.CALL_USAGE: 4}, {}]


async def test_after_a_small_batch_of_several_records_the_next_one_waits_twice_as_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def commit(*_: Any) -> dict[tuple[str, int], int]:
        return {}

    shard = bench.shard
    monkeypatch.setattr(shard._transactor, "commit", commit)
    monkeypatch.setattr("streams.engine.shard.monotonic", lambda: 0.0)
    lingers = {}
    for count in (1, 3, 4, 63, 64):
        calls = [a_call(count * 100 + number) for number in range(count)]
        await shard._book([bench.slice(topics.CALL_USAGE, *calls)])
        lingers[count] = round(shard._lingers_until * 1000)
    assert lingers == {1: 100, 3: 100, 4: 200, 63: 200, 64: 100}


async def test_usage_waits_until_all_that_is_due_is_booked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "MOST_TICKS", 1)
    ends = bench.now + HOUR
    grant = msgspec.structs.replace(a_grant("40", expires_at=ends), command_id="g-1")
    await bench.book(topics.COMMAND, grant)
    bench.now += 2 * HOUR
    late = a_call(1, started_at=bench.now.isoformat())
    first = await bench.book(topics.CALL_USAGE, late)
    kinds = [json.loads(value or b"")["kind"] for _, value, _ in first.by_topic[topics.LEDGER]]
    assert kinds == ["expiry"]
    assert [len(part.records) for part in bench.left] == [1]
    assert bench.shard.next_of(topics.CALL_USAGE) == 0
    second = await bench.book()
    [(_, value, _)] = second.by_topic[topics.LEDGER]
    assert json.loads(value or b"")["kind"] == "charge"
    assert bench.left == []


async def test_an_unrated_call_tells_what_it_may_cost(bench: Bench) -> None:
    call = a_call(1, callee="+440000000000", duration_s=61)
    outputs = await bench.book(topics.CALL_USAGE, call)
    [(key, value, headers)] = outputs.by_topic[topics.dead_letters_of(topics.CALL_USAGE)]
    assert (key, value) == (TENANT, _bytes(call))
    assert headers["credits-dlq-reason"] == b"unrated"
    assert headers["credits-dlq-exposure"] == b"2"


async def test_decks_that_are_published_count_from_the_next_batch(bench: Bench) -> None:
    terms = some_terms()
    dear = Tariff("default", "dear", {"44": Rate(prefix="44", per_minute=5 * NANOS)})
    versions = []
    for number, decks in ((1, None), (2, Decks(terms.tariff, [("default", NOW - HOUR, dear)]))):
        bench.shard.use(terms.with_decks(decks))
        outputs = await bench.book(topics.CALL_USAGE, a_call(number))
        [(_, entry, _)] = outputs.by_topic[topics.LEDGER]
        read = json.loads(entry or b"")
        versions.append((read["rate"]["version"], read["amount"]))
    assert versions == [("file-test", "-1"), ("dear", "-5")]


def a_correction(number: int, of: int, **changes: Any) -> dict[str, Any]:
    return a_call(number, phase="correction", corrects=f"e-{of}", **changes)


def moved_in(outputs: Recorded) -> list[tuple[str, str, str]]:
    """Of every entry: what caused it, kind and amount."""
    entries = [json.loads(value or b"") for _, value, _ in outputs.by_topic.get(topics.LEDGER, ())]
    return [(one["caused_by"]["id"], one["kind"], one["amount"]) for one in entries]


async def test_a_correction_reads_its_original_from_the_batch_it_was_booked_in(
    bench: Bench,
) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1, duration_s=180), a_call(2))
    await bench.book(topics.CALL_USAGE, a_call(3), a_call(4))
    outputs = await bench.book(topics.CALL_USAGE, a_correction(5, 1, duration_s=120), a_call(6))
    assert moved_in(outputs) == [
        ("e-5", "reversal", "3"),
        ("e-5", "charge", "-2"),
        ("e-6", "charge", "-1"),
    ]
    # The opening entry stands at 0, the first batch of calls at 1 and 2.
    assert bench.ledger.reads == [(1, 3)]
    assert bench.metric("credits_events_total", topic=topics.CALL_USAGE, outcome="corrected") == 1


async def test_what_is_corrected_already_or_unknown_is_refused(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    await bench.book(topics.CALL_USAGE, a_correction(2, 1, duration_s=120))
    outputs = await bench.book(
        topics.CALL_USAGE,
        a_correction(3, 1),
        a_correction(4, 77),
        a_correction(5, 5),
        a_correction(6, 1, source="another-pbx"),
        a_call(7, phase="correction"),
    )
    assert [reason for _, reason in letters_in(outputs)] == ["refused"] * 5
    letter = outputs.by_topic[topics.dead_letters_of(topics.CALL_USAGE)][0]
    assert letter[2]["credits-dlq-path"] == b"$.corrects"
    assert moved_in(outputs) == []
    # A letter keeps its id: after the cause is gone it can be written again.
    outputs = await bench.book(topics.CALL_USAGE, a_call(77), a_call(8))
    outputs = await bench.book(topics.CALL_USAGE, a_correction(4, 77, duration_s=0))
    assert moved_in(outputs) == [("e-4", "reversal", "1")]


async def test_two_corrections_of_one_call_in_a_batch_book_the_first(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    outputs = await bench.book(
        topics.CALL_USAGE, a_correction(2, 1, duration_s=120), a_correction(3, 1)
    )
    assert moved_in(outputs) == [("e-2", "reversal", "1"), ("e-2", "charge", "-2")]
    assert [reason for _, reason in letters_in(outputs)] == ["refused"]


async def test_a_correction_that_could_not_be_booked_corrects_nothing(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    outputs = await bench.book(
        topics.CALL_USAGE, a_correction(2, 1, callee="+999"), a_correction(3, 1, duration_s=0)
    )
    assert [reason for _, reason in letters_in(outputs)] == ["unrated"]
    assert moved_in(outputs) == [("e-3", "reversal", "1")]


async def test_repeats_and_conflicts_of_corrections_are_those_of_any_usage(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    correction = a_correction(2, 1, duration_s=120)
    await bench.book(topics.CALL_USAGE, correction)
    outputs = await bench.book(
        topics.CALL_USAGE, correction, correction | {"corrects": "e-9"}, a_call(3)
    )
    assert moved_in(outputs) == [("e-3", "charge", "-1")]
    assert [reason for _, reason in letters_in(outputs)] == ["conflict"]


async def test_a_correction_of_what_is_in_its_batch_ends_the_batch_before_it(
    bench: Bench,
) -> None:
    values = [
        a_call(1),
        b"{",
        a_correction(2, 1, duration_s=120),
        b"{",
        a_correction(3, 2, duration_s=0),
        a_call(4, unheard_of=1),
    ]
    first = await bench.book(topics.CALL_USAGE, *values)
    assert moved_in(first) == [("e-1", "charge", "-1")]
    assert letters_in(first) == [(1, "malformed_json")]
    assert bench.shard.next_of(topics.CALL_USAGE) == 2
    second = await bench.book()
    assert moved_in(second) == [("e-2", "reversal", "1"), ("e-2", "charge", "-2")]
    assert letters_in(second) == [(3, "malformed_json")]
    third = await bench.book()
    assert moved_in(third) == [("e-3", "reversal", "2"), ("e-4", "charge", "-1")]
    assert bench.left == []
    assert bench.shard.next_of(topics.CALL_USAGE) == 6
    # What was read twice is counted once.
    assert bench.metric("credits_unknown_fields_total", topic=topics.CALL_USAGE) == 1


async def test_slices_behind_the_cut_wait_too(bench: Bench) -> None:
    conference = a_call(2, conference_id="f", phase="correction", corrects="e-1", duration_s=120)
    slices = [
        bench.slice(topics.CALL_USAGE, a_call(1)),
        bench.slice(topics.CONFERENCE_USAGE, conference, a_call(3, conference_id="f")),
    ]
    work = await bench.shard._decide(slices)
    assert work.taken == slices[:1]
    [left] = work.left
    assert (left.follows, left.end, len(left.records)) == (0, 2, 2)


async def test_a_ledger_that_cannot_be_read_makes_no_dead_letter(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    bench.ledger.troubles = [UnknownOutcomeError("away")]
    part = bench.slice(topics.CALL_USAGE, a_correction(2, 1))
    with pytest.raises(UnknownOutcomeError):
        await bench.shard._decide([part])


async def test_a_replica_that_lags_behind_the_ledger_is_asked_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "_ASKED_EVERY_S", 0)
    await bench.book(topics.CALL_USAGE, a_call(1))
    bench.ledger.troubles = [OffsetOutOfRangeError({}), OffsetOutOfRangeError({})]
    outputs = await bench.book(topics.CALL_USAGE, a_correction(2, 1))
    assert topics.LEDGER in outputs.by_topic
    assert moved_in(outputs) == [("e-2", "reversal", "1"), ("e-2", "charge", "-1")]


async def test_what_was_deleted_from_the_ledger_cannot_be_corrected(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1))
    bench.ledger.troubles = [OffsetOutOfRangeError({})]
    bench.ledger.begins = len(bench.ledger.values)
    outputs = await bench.book(topics.CALL_USAGE, a_correction(2, 1))
    assert [reason for _, reason in letters_in(outputs)] == ["refused"]


async def test_only_corrections_read_the_ledger(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_call(1), a_call(2))
    await bench.book(topics.CALL_USAGE, a_call(1), a_call(3, phase="start"))
    assert bench.ledger.reads == []


async def test_what_waits_for_the_next_batch_stays_in_flight(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reading:
        """Knows which slices are done."""

        def __init__(self) -> None:
            self.ended: list[int] = []

        def current(self, _: Slice) -> bool:
            return True

        def done(self, part: Slice) -> None:
            self.ended.append(part.end)
            if booked.is_set():
                done.set()

    async def commit(outputs: Any, _: Any) -> dict[tuple[str, int], int]:
        bench.ledger.values += [value for _, value, _ in outputs.by_topic.get(topics.LEDGER, ())]
        return {(topics.LEDGER, 0): len(bench.ledger.values)}

    def publish(work: Work) -> None:
        published(work)
        if not work.left:
            booked.set()

    booked, done = asyncio.Event(), asyncio.Event()
    published = bench.shard._publish
    monkeypatch.setattr(bench.shard, "_publish", publish)
    monkeypatch.setattr(bench.shard._transactor, "commit", commit)
    reader, gate = Reading(), asyncio.Event()
    gate.set()
    bench.shard.deliver(bench.slice(topics.CALL_USAGE, a_call(1), a_correction(2, 1)))
    running = asyncio.ensure_future(bench.shard.run(gate, reader))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await done.wait()
    running.cancel()
    assert reader.ended == [2]
    kinds = [json.loads(value)["kind"] for value in bench.ledger.values]
    assert kinds == ["grant", "charge", "reversal", "charge"]


# -- open calls ------------------------------------------------------------------------------------

MINUTE = timedelta(minutes=1)


def a_phase(number: int, phase: str, elapsed_s: int, **changes: Any) -> dict[str, Any]:
    """A sign of life of a call that began just now, and of which all events name one leg."""
    members = {"phase": phase, "duration_s": elapsed_s, "started_at": NOW.isoformat()}
    return a_call(number, **members | changes)


async def test_an_account_that_is_kept_decoded_is_what_its_row_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_RECENT", 3)
    dice, decider = Random(5), bench.shard._decider
    names = [f"t-{number}".encode() for number in range(8)]
    for name in names[2:]:
        command = msgspec.structs.replace(opening(tenant_id=name.decode()), command_id=f"{name!r}")
        bench.left = [bench.slice(topics.COMMAND, command, keys=[name])]
        await bench.book()
    kept = 0
    for number in range(60):
        keys = dice.sample([TENANT, *names[2:]], 2)
        calls = [a_call(number * 2 + at, tenant_id=None) for at in range(2)]
        bench.left = [bench.slice(topics.CALL_USAGE, *calls, keys=keys)]
        await bench.book()
        # One that a later batch has touched stands before what it was.
        for key, account in (decider.earlier | decider.recent).items():
            assert account == decider.account_of(key, decider.rows[key])
            assert encode_row(account) == decider.rows[key]
            kept += 1
        assert all(key in decider.recent or key in decider.earlier for key in keys)
        assert len(decider.recent) <= 3
        assert len(decider.earlier) <= 5
    assert kept > 150


def balance_in(outputs: Recorded) -> dict[str, Any]:
    [(_, value, _)] = outputs.by_topic[topics.BALANCE]
    balance: dict[str, Any] = json.loads(value or b"")
    return balance


def hold_rows(bench: Bench) -> dict[bytes, bytes]:
    rows = bench.shard._rows.values
    return {key: value for key, value in rows.items() if owner_of(key)[1] == HOLD_MARK}


def restarted(bench: Bench) -> None:
    """What a restore finds: rows that the position row vouches for."""
    shard = bench.shard
    assert shard._rows.totals() == (shard.totals.rows, shard.totals.digest)
    position = shard.totals.position(now=shard.last_now, sources={}, seen_next=0)
    shard._totals = Totals.of(decode_position(encode_position(position)))
    shard._decider.recent.clear()
    shard._decider.earlier.clear()


async def test_a_recharge_fires_during_the_call_and_the_end_books_the_whole_leg(
    bench: Bench,
) -> None:
    outputs = await bench.book(topics.CALL_USAGE, a_phase(1, "start", 0))
    [request] = requests_of(outputs)
    assert (request["balance"], request["available"], request["exposure"]) == ("100", "99", "1")
    assert topics.LEDGER not in outputs.by_topic
    restarted(bench)
    bench.now = NOW + MINUTE
    public = balance_in(await bench.book(topics.CALL_USAGE, a_phase(2, "progress", 60)))
    assert (public["balance"], public["available"], public["exposure"]) == ("100", "98", "2")
    assert (bench.shard.totals.exposures, bench.shard.totals.holds) == ({"USD": 2 * NANOS}, 1)
    bench.now = NOW + 2 * MINUTE
    outputs = await bench.book(topics.CALL_USAGE, a_phase(3, "end", 100))
    [(_, entry, _)] = outputs.by_topic[topics.LEDGER]
    assert json.loads(entry or b"")["amount"] == "-2"
    public = balance_in(outputs)
    assert (public["balance"], public["available"], public.get("holds")) == ("98", "98", None)
    assert (bench.shard.totals.exposures, bench.shard.totals.holds) == ({"USD": 0}, 0)
    restarted(bench)
    # Late and alive, but ended.
    late = await bench.book(topics.CALL_USAGE, a_phase(4, "progress", 99))
    assert topics.BALANCE not in late.by_topic
    assert len(hold_rows(bench)) == 1
    bench.now = NOW + 6 * MINUTE
    outputs = await bench.book()
    assert hold_rows(bench) == {}
    # Neither the tenant's row nor its balance is written for an end that is forgotten.
    [(key, value, _), _position] = outputs.by_topic[topics.CHANGELOG]
    assert key is not None
    assert (owner_of(key), value) == ((TENANT, HOLD_MARK), None)
    restarted(bench)


async def test_a_hold_whose_platform_died_is_gone_after_three_minutes(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_phase(1, "start", 0), a_phase(2, "start", 0, leg_id="b"))
    assert bench.shard.totals.holds == 2
    bench.now = NOW + MINUTE
    await bench.book(topics.CALL_USAGE, a_phase(3, "progress", 60, leg_id="b"))
    bench.now = NOW + 3 * MINUTE - timedelta(microseconds=1)
    assert bench.shard._rows.due(microseconds(bench.now), 10) == []
    bench.now = NOW + 3 * MINUTE
    outputs = await bench.book()
    assert balance_in(outputs)["exposure"] == "2"
    assert len(hold_rows(bench)) == 1
    restarted(bench)
    bench.now = NOW + 4 * MINUTE
    assert "exposure" not in balance_in(await bench.book())
    assert hold_rows(bench) == {}
    assert bench.metric("credits_events_total", topic="tick", outcome="ticked") == 2
    restarted(bench)


async def test_a_phase_of_the_batch_in_which_its_hold_dies_holds_anew(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_phase(1, "start", 0))
    bench.now = NOW + 4 * MINUTE
    outputs = await bench.book(topics.CALL_USAGE, a_phase(2, "progress", 240))
    assert balance_in(outputs)["exposure"] == "5"
    [value] = hold_rows(bench).values()
    assert due_of(value) == microseconds(NOW + 7 * MINUTE)
    restarted(bench)


async def test_phases_that_only_keep_a_hold_alive_change_no_balance(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_phase(1, "progress", 1))
    await bench.book(topics.CALL_USAGE, a_phase(2, "progress", 2))
    bench.now = NOW + MINUTE
    outputs = await bench.book(topics.CALL_USAGE, a_phase(3, "progress", 60))
    assert topics.BALANCE not in outputs.by_topic
    [value] = hold_rows(bench).values()
    assert due_of(value) == microseconds(NOW + 4 * MINUTE)


async def test_a_whole_call_in_one_batch_holds_nothing_and_a_repeat_does_not_show(
    bench: Bench,
) -> None:
    bench.now = NOW + MINUTE
    phases = [a_phase(1, "start", 0), a_phase(2, "progress", 30), a_phase(3, "end", 60)]
    assert balance_in(await bench.book(topics.CALL_USAGE, *phases))["available"] == "99"
    outputs = await bench.book(topics.CALL_USAGE, *phases)
    assert outputs.by_topic.keys() == {topics.CHANGELOG}
    assert bench.shard.totals.holds == 0


async def test_ordinary_calls_look_up_no_hold(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    leg_of = holds.leg_of

    def watched(event: UsageEvent) -> str:
        looked.append(event.call_id)
        return leg_of(event)

    monkeypatch.setattr(holds, "leg_of", watched)
    await bench.book(topics.CALL_USAGE, a_call(1), a_call(2, phase="end"))
    assert looked == []
    # With calls open, any end may be theirs.
    await bench.book(topics.CALL_USAGE, a_phase(3, "start", 0, call_id="open"))
    await bench.book(topics.CALL_USAGE, a_call(4, call_id="ended"))
    assert looked == ["open", "ended"]


async def test_a_hold_whose_tick_breaks_us_waits_an_hour(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.book(topics.CALL_USAGE, a_phase(1, "start", 0))

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    bench.now = NOW + 3 * MINUTE
    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(holds, "die", broken)
        await bench.book(topics.CALL_USAGE, a_call(2))
    assert [(line["event"], line["place"]) for line in logs] == [("defect", "tick/t-1")]
    assert bench.metric("credits_events_total", topic="tick", outcome="rejected") == 1
    assert bench.shard.totals.holds == 1
    [value] = hold_rows(bench).values()
    assert due_of(value) == microseconds(bench.now + HOUR)
    bench.now += HOUR
    await bench.book()
    assert (bench.shard.totals.holds, hold_rows(bench)) == (0, {})


async def test_a_record_that_breaks_us_is_a_dead_letter_and_the_log_says_where(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: Any, cause: Any) -> UsageEvent:
        if data.call_id == "breaks":
            raise ZeroDivisionError("a call to +442079460018")
        return usage_event(data, cause)

    monkeypatch.setattr(batch, "usage_event", broken)
    with capture_logs() as logs:
        written = await bench.book(
            topics.CALL_USAGE, a_call(1), a_call(2, call_id="breaks"), a_call(3)
        )
    assert len(written.by_topic[topics.LEDGER]) == 2
    [(_, _, headers)] = written.by_topic[topics.dead_letters_of(topics.CALL_USAGE)]
    assert (headers["credits-dlq-reason"], headers["credits-dlq-offset"]) == (b"defect", b"1")
    [line] = logs
    assert (line["event"], line["place"]) == ("defect", f"{topics.CALL_USAGE}/1")
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_more_than_ten_defects_in_a_minute_end_the_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> UsageEvent:
        raise ZeroDivisionError

    monkeypatch.setattr(batch, "usage_event", broken)
    await bench.book(topics.CALL_USAGE, *map(a_call, range(10)))
    with pytest.raises(GaveUpError, match="more than 10 defects"):
        await bench.book(topics.CALL_USAGE, a_call(10))


async def test_an_end_that_overtakes_the_start_of_its_leg_is_remembered(bench: Bench) -> None:
    await bench.book(topics.CALL_USAGE, a_phase(1, "end", 1, leg_id="leg"))
    await bench.book(topics.CALL_USAGE, a_phase(2, "start", 0, leg_id="leg"))
    assert bench.shard.totals.holds == 0
    # Without a leg id it is, while any other call is open.
    await bench.book(topics.CALL_USAGE, a_phase(3, "start", 0, leg_id="other"))
    await bench.book(topics.CALL_USAGE, a_phase(4, "end", 1, call_id="d"))
    await bench.book(topics.CALL_USAGE, a_phase(5, "start", 0, call_id="d"))
    assert bench.shard.totals.holds == 1


async def test_no_two_batches_have_one_instant(bench: Bench) -> None:
    """Also while the clock stands, or is a little back: who reads tells one from the other."""
    instants = [bench.shard.last_now]
    for number, back_s in enumerate((0, 0, 60, 60), 1):
        bench.now = NOW - timedelta(seconds=back_s)
        await bench.book(topics.CALL_USAGE, a_call(number))
        instants.append(bench.shard.last_now)
    assert instants == sorted(set(instants))
    assert instants[-1] - instants[0] < timedelta(milliseconds=1)


async def test_the_position_row_marks_once_a_week_where_in_the_ids_it_was(bench: Bench) -> None:
    def marks(outputs: Recorded) -> list[tuple[int, timedelta]]:
        [value] = [v for k, v, _ in outputs.by_topic[topics.CHANGELOG] if k == POSITION_KEY]
        position = decode_position(value or b"")
        assert position.seen_next == bench.shard._seen_next
        days = [(batch.instant_from(us) - NOW) // day * day for _, us in position.seen_marks]
        return [(ordinal, at) for (ordinal, _), at in zip(position.seen_marks, days, strict=True)]

    day = timedelta(days=1)
    assert marks(await bench.book(topics.CALL_USAGE, a_call(1))) == [(0, 0 * day)]
    bench.now += 8 * day
    # Nothing but a tick, and a repeat: no ids, no mark.
    await bench.book()
    bench.now += day
    assert marks(await bench.book(topics.CALL_USAGE, a_call(1))) == [(0, 0 * day)]
    assert marks(await bench.book(topics.CALL_USAGE, a_call(2))) == [(0, 0 * day), (2, 9 * day)]
    assert marks(await bench.book(topics.CALL_USAGE, a_call(3))) == [(0, 0 * day), (2, 9 * day)]
