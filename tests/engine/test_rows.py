"""Rows in memory: due times, totals, the position row."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.engine.rows import (
    NEVER,
    Position,
    Rows,
    SourcePosition,
    Totals,
    decode_position,
    encode_position,
)


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
    assert rows.next_due() == NEVER


CHANGES = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.none() | st.integers(0, 99)), max_size=30
)


@given(CHANGES)
def test_totals_kept_up_equal_totals_recounted(changes: list[tuple[bytes, int | None]]) -> None:
    rows, totals = Rows(), Totals()
    for key, due in changes:
        value = None if due is None else row(due)
        totals.row(key, rows.values.get(key), value)
        rows.put(key, value)
    assert (totals.rows, totals.digest) == rows.totals()


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
