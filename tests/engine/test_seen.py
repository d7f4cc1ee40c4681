"""Remembered ids: exact, by generation, with conflicts told apart."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.engine import identity, seen
from streams.engine.identity import week_of
from streams.engine.seen import (
    REMEMBERED,
    WEEK,
    Ids,
    Seen,
    pack,
    unpack,
)

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)


def ids(fingerprints: list[int], *, week: int = 2900, ordinal: int = 0) -> Ids:
    return unpack(
        pack(
            ordinal=ordinal,
            ledger_from=0,
            now_us=0,
            fingerprints=fingerprints,
            checks=[value & 0xFFFF_FFFF for value in fingerprints],
            weeks=[week] * len(fingerprints),
        )
    )


def test_what_was_remembered_is_found_with_its_check() -> None:
    remembered = Seen()
    remembered.remember(ids([5, 6, 7]))
    assert remembered.probe([7, 8, 5]) == {0: 7, 2: 5}


@given(st.lists(st.integers(1, 2**64 - 1), unique=True, max_size=200), st.integers(1, 50))
def test_few_and_many_are_probed_alike(fingerprints: list[int], chunk: int) -> None:
    remembered = Seen()
    half = fingerprints[::2]
    for at in range(0, len(half), chunk):
        remembered.remember(ids(half[at : at + chunk], week=2900 + at % 3))
    one_by_one = {
        at: check
        for at, value in enumerate(fingerprints)
        for check in remembered.probe([value]).values()
    }
    assert remembered.probe(fingerprints) == one_by_one
    assert set(one_by_one) == set(range(0, len(fingerprints), 2))


def test_what_comes_in_small_batches_is_the_same_as_what_comes_in_large_ones() -> None:
    dice = random.Random(3)
    fingerprints = [dice.getrandbits(64) | 1 for _ in range(30_000)]
    by_few, by_many = Seen(), Seen()
    for at in range(0, len(fingerprints), 7):
        by_few.remember(ids(fingerprints[at : at + 7]))
    for at in range(0, len(fingerprints), 5_000):
        by_many.remember(ids(fingerprints[at : at + 5_000]))
    assert by_few.digest() == by_many.digest()
    assert by_few.probe(fingerprints) == by_many.probe(fingerprints)
    assert len(by_few.probe(fingerprints)) == len(fingerprints)


def test_ids_that_crowd_at_the_tables_end_survive_its_growth() -> None:
    dice = random.Random(5)
    fingerprints = [(0xFFFFFF << 40) | dice.getrandbits(40) for _ in range(2_500)]
    remembered = Seen()
    for at in range(0, len(fingerprints), 40):
        remembered.remember(ids(fingerprints[at : at + 40]))
    assert len(remembered.probe(fingerprints)) == len(fingerprints)


def test_a_table_that_grows_forgets_nothing() -> None:
    dice = random.Random(7)
    fingerprints = [dice.getrandbits(64) | 1 for _ in range(300_000)]
    remembered = Seen()
    for at in range(0, len(fingerprints), 7_000):
        remembered.remember(ids(fingerprints[at : at + 7_000]))
    assert len(remembered) == len(set(fingerprints))
    assert len(remembered.probe(fingerprints)) == len(fingerprints)
    assert not remembered.probe([value ^ 1 << 63 for value in fingerprints[:1_000]])


def test_a_generation_goes_as_a_whole_35_days_after_its_week() -> None:
    remembered = Seen()
    week = week_of(MONDAY)
    remembered.remember(ids([1], week=week))
    remembered.remember(ids([2], week=week + 1))
    end_of_first = identity.EPOCH + (week + 1) * WEEK
    remembered.forget(end_of_first + REMEMBERED)
    assert set(remembered.probe([1, 2])) == {0, 1}
    remembered.forget(end_of_first + REMEMBERED + timedelta(seconds=1))
    assert set(remembered.probe([1, 2])) == {1}


# Near each other, at both ends and anywhere: what a table must hold however it is crowded.
FINGERPRINTS = st.one_of(
    st.integers(1, 2**64 - 1),
    st.integers(1, 60),
    st.integers(2**64 - 60, 2**64 - 1),
    st.integers(1, 60).map(lambda high: high << 58 | high),
)


@st.composite
def logs(draw: st.DrawFn) -> list[bytes]:
    """Packed records of some batches; no id comes twice."""
    values = draw(st.lists(FINGERPRINTS, unique=True, max_size=400))
    records: list[bytes] = []
    while values:
        count = draw(st.integers(1, len(values)))
        batch, values = values[:count], values[count:]
        weeks = st.lists(st.integers(2900, 2903), min_size=count, max_size=count)
        records.append(
            pack(
                ordinal=len(records),
                ledger_from=0,
                now_us=0,
                fingerprints=batch,
                checks=[value * 31 & 0xFFFF_FFFF for value in batch],
                weeks=draw(weeks),
            )
        )
    return records


@given(logs(), st.lists(FINGERPRINTS, max_size=40), st.integers(0, 3))
def test_a_restored_set_equals_the_live_one(
    records: list[bytes], strangers: list[int], over: int
) -> None:
    live, restored = Seen(), Seen()
    now = identity.EPOCH + (2900 + over) * WEEK + REMEMBERED + timedelta(seconds=1)
    for record in records:
        live.remember(unpack(record))
    live.forget(now)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seen, "_LOADED_AT_ONCE", 3)
        for _ in restored.load([unpack(record) for record in records], now):
            pass
    told = {
        int(value): int(check)
        for one in map(unpack, records)
        for value, check, week in zip(one.fingerprints, one.checks, one.weeks, strict=True)
        if week >= 2900 + over
    }
    wanted = [*strangers, *told]
    expected = {at: told[value] for at, value in enumerate(wanted) if value in told}
    assert restored.probe(wanted) == live.probe(wanted) == expected
    assert restored.digest() == live.digest()
    assert len(restored) == len(live)


def test_an_id_differs_in_the_digest_by_its_check_and_by_its_ordinal() -> None:
    def of(*, ordinal: int, check: int) -> dict[int, int]:
        one = Seen()
        one.remember(
            unpack(
                pack(
                    ordinal=ordinal,
                    ledger_from=0,
                    now_us=0,
                    fingerprints=[7],
                    checks=[check],
                    weeks=[1],
                )
            )
        )
        return one.digest()

    assert of(ordinal=1, check=2) == of(ordinal=1, check=2)
    assert of(ordinal=1, check=2) != of(ordinal=1, check=3)
    assert of(ordinal=1, check=2) != of(ordinal=2, check=2)


@given(st.lists(FINGERPRINTS, unique=True, max_size=600), st.data())
def test_a_growing_table_answers_like_a_dictionary(values: list[int], data: st.DataObject) -> None:
    # So little is moved at once that most answers come from a table half moved.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seen, "_MOVED_AT_LEAST", 1)
        patched.setattr(seen, "_MOVED_PER_ID", 1)
        # Small tables double, large ones grow by a quarter; in between one becomes the other.
        patched.setattr(seen, "_SMALL_BUCKETS", data.draw(st.sampled_from((0, 64, 1 << 14))))
        table, model = seen._Table(), dict[int, tuple[int, int]]()
        asked = np.array(values or [1], dtype=np.uint64)
        while values:
            count = data.draw(st.integers(1, min(40, len(values))))
            batch, values = values[:count], values[count:]
            told = {value: (value & 0xFFFF, len(model)) for value in batch}
            model |= told
            table.insert(
                np.array(batch, dtype=np.uint64),
                np.array([check for check, _ in told.values()], dtype=np.uint32),
                np.array([ordinal for _, ordinal in told.values()], dtype=np.uint32),
            )
            places, checks, ordinals = table.find(asked)
            found = {
                int(asked[at]): (int(check), int(ordinal))
                for at, check, ordinal in zip(places, checks, ordinals, strict=True)
            }
            assert found == model
            assert all(table.find_one(value) == model[value] for value in batch)
    assert table.count == len(model)


def test_an_id_of_many_never_takes_more_than_24_bytes_and_no_insert_moves_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dice = np.random.default_rng(5)
    remembered, placed = Seen(), 0
    place = seen._Table._place

    def counted(table: seen._Table, *columns: Any) -> None:
        nonlocal placed
        placed = max(placed, len(columns[0]))
        place(table, *columns)

    monkeypatch.setattr(seen._Table, "_place", counted)
    monkeypatch.setattr(seen, "_MOVED_AT_ONCE", 2_048)
    while len(remembered) < 400_000:
        batch = dice.integers(1, 2**64 - 1, size=600, dtype=np.uint64)
        remembered.remember(ids(batch.tolist()))
        if len(remembered) > 120_000:  # smaller tables are allowed more, to grow for less
            assert remembered.size_bytes <= 24 * len(remembered)
        elif len(remembered) > 20_000:
            assert remembered.size_bytes <= 40 * len(remembered)
    assert placed <= 2_048 * 8 + 600


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x02" + bytes(24),
        pack(ordinal=1, ledger_from=0, now_us=0, fingerprints=[1], checks=[1], weeks=[1])[:-1],
    ],
)
def test_a_damaged_record_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="packed ids"):
        unpack(value)


def test_no_identity_has_the_mark_of_an_empty_slot() -> None:
    assert identity.fingerprint("a", "b") != 0
    assert identity.fingerprint("a", "b\0c") != identity.fingerprint("a\0b", "c")


def batch_at(ordinal: int, ledger_from: int, fingerprint: int) -> Ids:
    """A batch of one id whose ledger entries begin there."""
    return unpack(
        pack(
            ordinal=ordinal,
            ledger_from=ledger_from,
            now_us=0,
            fingerprints=[fingerprint],
            checks=[1],
            weeks=[2900],
        )
    )


def test_an_id_leads_to_the_ledger_entries_of_its_batch() -> None:
    remembered = Seen()
    for number in range(5):
        remembered.remember(batch_at(100 + number, 10 * number, 7 + number))
    assert remembered.ordinal_of(99) is None
    ordinal = remembered.ordinal_of(9)
    assert ordinal == 102
    assert remembered.ledger_range(ordinal, 77) == (20, 30)
    assert remembered.ledger_range(104, 77) == (40, 77)
    restored = Seen()
    log = [batch_at(100 + number, 10 * number, 7 + number) for number in range(5)]
    for _ in restored.load(log, MONDAY):
        pass
    assert restored.ledger_range(102, 77) == (20, 30)


def test_places_in_the_ledger_stay_few_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_MOST_STARTS", 16)
    remembered = Seen()
    for number in range(1_000):
        remembered.remember(batch_at(50 + number, 3 * number, 1 + number))
        assert len(remembered._starts._offsets) < 16
    for number in range(1_000):
        first, end = remembered.ledger_range(50 + number, 3_000)
        assert first <= 3 * number < 3 * number + 3 <= end
        assert end - first <= 3 * 128


def test_that_something_is_corrected_is_no_events_id() -> None:
    mark = identity.corrected("pbx", "e1")
    assert mark != identity.corrected("pbx", "e2")
    assert mark not in (
        identity.fingerprint("corrected\0pbx", "e1"),
        identity.fingerprint("corrected", "pbx\0e1"),
    )
