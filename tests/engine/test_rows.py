"""Rows in memory: due times, totals, the position row."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from streams.engine.position import (
    Position,
    SourcePosition,
    decode_position,
    encode_position,
    marked,
    oldest_kept,
)
from streams.engine.rows import (
    HOLD_MARK,
    NEVER,
    PAYMENT_MARK,
    Rows,
    Totals,
    hold_key,
    owner_of,
    payment_key,
)
from tests.billing.builders import NOW, an_account


def row(due: int, rest: bytes = b"x") -> bytes:
    return due.to_bytes(8, "big") + rest


def test_rows_come_due_earliest_first() -> None:
    rows = Rows()
    for key, due in ((b"a", 30), (b"b", 10), (b"c", NEVER), (b"d", 20)):
        rows.put(key, row(due))
    assert rows.due(20, 10) == [(10, b"b"), (20, b"d")]
    assert rows.next_due() == 10


def test_a_row_stays_due_until_it_is_given_another_instant() -> None:
    rows = Rows()
    rows.put(b"a", row(10))
    assert rows.due(10, 10) == rows.due(10, 10) == [(10, b"a")]
    rows.put(b"a", row(50))
    assert rows.due(10, 10) == []
    assert rows.next_due() == 50


def test_a_deleted_row_is_never_due() -> None:
    rows = Rows()
    rows.put(b"a", row(10))
    rows.put(b"a", None)
    assert rows.due(10, 10) == []
    assert rows.next_due() == NEVER


HOUR = 1 << 32
INSTANTS = st.integers(0, 99) | st.sampled_from([HOUR - 1, HOUR, 3 * HOUR, 3 * HOUR + 5, NEVER])
CHANGES = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.none() | INSTANTS), max_size=30
)


@given(CHANGES, st.lists(INSTANTS, min_size=1, max_size=4))
def test_what_is_due_is_what_the_rows_say_whatever_was_written_before(
    changes: list[tuple[bytes, int | None]], asked: list[int]
) -> None:
    rows, model = Rows(), dict[bytes, int]()
    until = 0
    for at, (key, due) in enumerate(changes):
        rows.put(key, None if due is None else row(due))
        model.pop(key, None)
        if due is not None:
            model[key] = due
        # Time goes on while rows are written.
        until = max(until, min(asked[at % len(asked)], NEVER - 1))
        expected = sorted((due, key) for key, due in model.items() if due <= until)
        assert rows.next_due() <= min((due for due in model.values()), default=NEVER)
        assert rows.due(until, 10) == expected
        assert rows.next_due() > until or expected


def test_hours_in_which_nobody_asked_are_not_passed_over() -> None:
    rows = Rows()
    for key, due in ((b"a", HOUR), (b"b", 3 * HOUR), (b"c", 7 * HOUR)):
        rows.put(key, row(due))
    assert [key for _, key in rows.due(4 * HOUR, 10)] == [b"a", b"b"]


def test_a_due_time_that_moves_to_and_fro_for_ever_takes_no_more_memory() -> None:
    rows = Rows()
    for number in range(100):
        rows.put(b"%d" % number, row(9 * HOUR))
    for turn in range(40_000):
        rows.put(b"%d" % (turn % 100), row((1 + turn // 100 % 9) * HOUR))
        assert rows._filed <= 2 * 100 + 1_024
    held = sum(map(len, rows._later.values())) + len(rows._near)
    assert held == rows._filed


@given(CHANGES)
def test_totals_kept_up_equal_totals_recounted(changes: list[tuple[bytes, int | None]]) -> None:
    rows, totals = Rows(), Totals()
    for key, due in changes:
        value = None if due is None else row(due)
        totals.row(key, rows.values.get(key), value)
        rows.put(key, value)
    assert (totals.rows, totals.digest) == rows.totals()


def test_tenants_are_counted_by_the_state_of_their_account() -> None:
    account = an_account()
    paused = account.changed(recharging=replace(account.standing.recharging, stage="paused"))
    for one in (account, paused, paused.changed(closed_at=NOW)):
        totals = Totals()
        totals.tenant(None, one)
        assert totals.tenants == {one.state: 1}


@given(CHANGES)
def test_loaded_rows_are_due_as_published_ones(changes: list[tuple[bytes, int | None]]) -> None:
    published, loaded = Rows(), Rows()
    records = [(key, None if due is None else row(due)) for key, due in changes]
    for key, value in records:
        published.put(key, value)
    loaded.load(records)
    loaded.index_due()
    assert published.due(100, 100) == loaded.due(100, 100)


def a_position() -> Position:
    return Position(
        now=datetime(2026, 3, 2, tzinfo=UTC),
        sources={"usage": SourcePosition(next=3, last=2, timestamp=5, hash="00")},
        rows=1,
        digest="0" * 16,
        balances={"USD": ("5", "-2")},
        tenants={"idle": 1},
        seen_next=4,
    )


def test_a_position_row_is_read_back_as_written() -> None:
    assert decode_position(encode_position(a_position())) == a_position()


def test_a_position_row_of_a_newer_version_is_refused() -> None:
    newer = msgspec.structs.replace(a_position(), version=2)
    with pytest.raises(ValueError, match="newer than this program"):
        decode_position(encode_position(newer))


def test_a_key_tells_whose_row_it_is_and_of_what_whatever_an_id_holds() -> None:
    assert owner_of(b"t-1") == (b"t-1", b"")
    assert owner_of(payment_key("t-1", "p\0hold\0x")) == (b"t-1", PAYMENT_MARK)
    assert owner_of(hold_key(b"t-1", "a\0pay\0x")) == (b"t-1", HOLD_MARK)


def test_a_row_of_before_the_marks_is_read() -> None:
    older = msgspec.json.decode(encode_position(a_position()))
    del older["seen_marks"]
    assert decode_position(msgspec.json.encode(older)) == a_position()


def test_an_older_program_reads_a_row_with_members_it_does_not_know() -> None:
    newer = msgspec.json.decode(encode_position(a_position())) | {"of_tomorrow": [[1, 2]]}
    assert decode_position(msgspec.json.encode(newer)) == a_position()


DAY_US = 86_400_000_000


def test_ids_are_marked_once_a_week_and_for_as_long_as_their_log_is_kept() -> None:
    marks: tuple[tuple[int, int], ...] = ()
    for day in range(100):
        marks = marked(marks, 10 * day, day * DAY_US)
    # The latest is of the 98th day. One that is past its 43 days bounds what is between.
    assert marks == tuple((10 * day, day * DAY_US) for day in range(49, 99, 7))
    assert oldest_kept(marks, 98 * DAY_US) == 560
    assert oldest_kept(marks, 1_000 * DAY_US) is None
    assert oldest_kept((), 0) is None


def test_a_mark_stays_while_no_ids_are_written() -> None:
    assert marked(((0, 0),), 1, 7 * DAY_US - 1) == ((0, 0),)
    assert marked(((0, 0),), 1, 7 * DAY_US) == ((0, 0), (1, 7 * DAY_US))
    assert marked(((0, 0),), 1, 500 * DAY_US) == ((0, 0), (1, 500 * DAY_US))
