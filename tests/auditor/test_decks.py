"""The auditor's reading of published decks, held against the product's and against wrong books."""

import zlib
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import topics
from streams.billing import rating
from streams.billing.tariff import parse_deck
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.prices import Deck, decks_of
from streams.testbed.auditor.records import Record
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import Options
from tests.auditor.books import AT, DECK, NAMES, Books, record, usage, violated

COLUMNS = (
    "Destination Name,Destination Type,Country,Prefix,Price / min,Connect fee,Initial increment,"
    "Increment,Rounding,Steps,Windows,Weight,Split,Max cost"
)
STARTED = datetime(2026, 3, 2, 10, tzinfo=UTC)

prices = st.integers(0, 99_999).map(lambda cents: f"{cents // 1000}.{cents % 1000:03}")
increments = st.sampled_from(["", "1", "6", "30", "60"])


def _written(said: list[tuple[int, str, int]]) -> str:
    """Steps as a deck has them, from second 0."""
    by_start = {one[0]: one for one in [(0, "0.5", 60), *said]}
    parts = [f"{start}:{price}/{step}" for start, price, step in sorted(by_start.values())]
    return "; ".join(parts) if said else ""


steps = st.lists(
    st.tuples(st.integers(1, 400), prices, st.sampled_from([1, 6, 60])), max_size=3
).map(_written)
windows = st.sampled_from(
    [
        "", "1-5 08:00-18:00 Europe/London", "22:00-06:00", "6-7; 18:00-24:00 America/New_York",
        "@3-29 Asia/Kathmandu", "@15", "1-3 00:30-23:45 Australia/Lord_Howe", "00:00-12:00; 1",
    ]
)  # fmt: skip
rows = st.builds(
    lambda prefix, price, fee, first, step, rule, parts, window, weight, split, most: (
        f"X,m,GB,{prefix},{price},{fee},{first},{step},{rule},{parts},{window},{weight},{split},{most}"
    ),
    st.sampled_from(["44", "442", "4420", "33"]), prices, prices, increments, increments,
    st.sampled_from(["", "up/2", "down/3", "half_up/4"]), steps, windows,
    st.sampled_from(["", "1", "2", "3"]), st.sampled_from(["", "yes"]),
    st.sampled_from(["", "1.5", "2/free", "0.5/disconnect"]),
)  # fmt: skip


def _told_apart(rows: list[str]) -> list[str]:
    """At most one row of a prefix without windows, and none twice."""
    kept: dict[tuple[str, ...], str] = {}
    for row in rows:
        parts = row.split(",")
        kept[parts[3], parts[10], parts[11] if parts[10] else ""] = row
    return list(kept.values())


@given(
    st.lists(rows, min_size=1, max_size=8).map(_told_apart),
    st.integers(0, 250 * 86_400),
    st.integers(0, 20_000),
)
def test_both_read_the_same_price_from_any_deck(
    rows: list[str], second: int, duration_s: int
) -> None:
    text = "\n".join([COLUMNS, *rows]) + "\n"
    at = STARTED + timedelta(seconds=second)
    tariff = parse_deck(text, deck="d", version="v")
    charge = rating.price_special(tariff, "442079460018", at, duration_s)
    theirs = Deck(text.encode()).price("442079460018", at, duration_s)
    assert theirs == (None if charge is None else charge.amount_nanos)


def published(version: str, text: str, since: str, **changes: Any) -> list[Record]:
    content = text.encode()
    whole = zlib.compress(content)
    manifest = {
        "deck": "default", "version": version, "effective_from": since,
        "published_at": "2026-02-01T00:00:00Z", "chunks": 2,
        "sha256": sha256(content).hexdigest(),
    } | changes  # fmt: skip
    name = f"{manifest['deck']}/{version}".encode()
    return [
        record(topics.TARIFF, 0, whole[:40], name + b"/0"),
        record(topics.TARIFF, 1, whole[40:], name + b"/1"),
        record(topics.TARIFF, 2, manifest, name + b"/manifest"),
    ]


DEAR = f"{COLUMNS}\nLondon,landline,GB,4420,0.90,,,,,,,,,\n"


class Priced(Books):
    """Books whose call is priced by a published version."""

    def __init__(self, version: str = "dear", amount: str = "-0.9", **rate: Any) -> None:
        super().__init__()
        after = 100 + float(amount)
        self.entries[1]["amount"] = amount
        self.entries[1]["balance_after"] = f"{after:g}"
        self.entries[2]["balance_after"] = f"{after + 50:g}"
        self.entries[1]["rate"] |= {"deck": "default", "version": version, **rate}
        self.versions = published("dear", DEAR, "2026-03-01T00:00:00Z")

    def judged(self) -> Report:
        report, _ = audit(
            [self.log()], names=NAMES, partitions=1, deck=DECK,
            published=decks_of(self.versions), options=Options(),
        )  # fmt: skip
        return report


def test_a_call_by_a_published_version_holds() -> None:
    report = Priced().judged()
    assert violated(report) == set(), report.lines()


def test_a_version_that_is_not_complete_is_not_at_hand() -> None:
    books = Priced()
    del books.versions[0]
    report = books.judged()
    assert violated(report) == set()
    assert report.findings["price"].unknown


def test_a_wrong_price_by_a_published_version_is_found() -> None:
    assert "price" in violated(Priced(amount="-0.8").judged())


def test_a_version_that_was_not_in_force_yet_is_found() -> None:
    books = Priced()
    books.versions = published("dear", DEAR, "2026-03-03T00:00:00Z")
    assert "price" in violated(books.judged())


def test_a_version_that_a_later_one_had_followed_is_found() -> None:
    books = Priced(version=DECK.version, amount="-0.6")
    assert "price" in violated(books.judged())
    books.versions = published(
        "dear", DEAR, "2026-03-01T00:00:00Z", published_at="2026-03-02T09:58:00Z"
    )
    assert violated(books.judged()) == set()


def test_a_deck_that_is_not_the_tenants_is_found() -> None:
    books = Priced(deck="partners")
    books.versions = published("dear", DEAR, "2026-03-01T00:00:00Z", deck="partners")
    assert "price" in violated(books.judged())
    books.records[topics.COMMAND].append(
        record(
            topics.COMMAND, 1,
            {"command": "tariff_assignment", "command_id": "a", "source": "cli",
             "deck": "partners"},
        )
    )  # fmt: skip
    books.records[topics.NOTIFICATION].append(
        record(topics.NOTIFICATION, 1, {"notice": "command_applied", "command_id": "a", "at": AT})
    )
    books.next[topics.COMMAND] = 2
    report = books.judged()
    assert violated(report) == set(), report.lines()


@pytest.mark.parametrize(
    ("since", "known_at", "expected"),
    [
        ("2026-03-01T00:00:00Z", "2026-03-02T09:00:00Z", set()),
        ("2026-03-02T10:00:01Z", "2026-03-02T09:00:00Z", {"price"}),
        ("2026-03-01T00:00:00Z", "2026-03-02T10:00:01Z", {"price"}),
    ],
)
def test_a_deck_is_the_tenants_from_its_instant_on_once_it_is_assigned(
    since: str, known_at: str, expected: set[str]
) -> None:
    books = Priced(deck="partners")
    books.versions = published("dear", DEAR, "2026-03-01T00:00:00Z", deck="partners")
    books.next[topics.COMMAND] = 2
    books.records[topics.COMMAND].append(
        record(
            topics.COMMAND, 1,
            {"command": "tariff_assignment", "command_id": "a", "source": "cli",
             "deck": "partners", "effective_from": since},
        )
    )  # fmt: skip
    applied = {"notice": "command_applied", "command_id": "a", "at": known_at}
    books.records[topics.NOTIFICATION].append(record(topics.NOTIFICATION, 1, applied))
    books.position_changes = {"now": max(AT, known_at)}
    assert violated(books.judged()) == expected


def test_a_split_call_is_judged_with_its_event() -> None:
    windowed = (
        f"{COLUMNS}\nDay,landline,GB,4420,0.90,,1,1,,,08:00-10:00,1,yes,\n"
        "Night,landline,GB,4420,0.30,,1,1,,,,,yes,\n"
    )
    started = "2026-03-02T09:59:30Z"
    for amount, wrong in (("-0.6", False), ("-0.9", True)):
        books = Priced(amount=amount, started_at=started)
        books.versions = published("dear", windowed, "2026-03-01T00:00:00Z")
        for at, name in enumerate(("e1", "e1")):
            value = usage(name, started_at=started)
            books.records[topics.CALL_USAGE][at] = record(topics.CALL_USAGE, at, value)
        assert ("price" in violated(books.judged())) is wrong
