"""Remembered ids: exact, by generation, with conflicts told apart."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.engine import seen
from streams.engine.seen import REMEMBERED, WEEK, Ids, Seen, pack, unpack, week_of

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
    end_of_first = seen.EPOCH + (week + 1) * WEEK
    remembered.forget(end_of_first + REMEMBERED)
    assert set(remembered.probe([1, 2])) == {0, 1}
    remembered.forget(end_of_first + REMEMBERED + timedelta(seconds=1))
    assert set(remembered.probe([1, 2])) == {1}


def test_a_restored_set_equals_the_live_one() -> None:
    dice = random.Random(3)
    live, restored = Seen(), Seen()
    packed = []
    for ordinal in range(40):
        batch = [dice.getrandbits(64) | 1 for _ in range(dice.randrange(1, 900))]
        value = pack(
            ordinal=ordinal,
            ledger_from=ordinal,
            now_us=0,
            fingerprints=batch,
            checks=[value & 0xFFFF for value in batch],
            weeks=[2900 + ordinal % 4] * len(batch),
        )
        live.remember(unpack(value))
        packed.append(value)
    for value in packed:
        restored.remember(unpack(value))
    assert restored.digest() == live.digest()
    assert len(restored) == len(live)


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
    assert seen.fingerprint("a", "b") != 0
    assert seen.fingerprint("a", "b\0c") != seen.fingerprint("a\0b", "c")
