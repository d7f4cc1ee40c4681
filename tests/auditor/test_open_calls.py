"""Open calls as the auditor sees them: who must hold money, how much, and for how long."""

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from schemas import topics
from streams.billing import holds
from streams.billing.events import Cause
from streams.testbed.auditor.calls import name_of
from streams.testbed.auditor.verdict import HOLDS
from tests.auditor.books import AT, Books, record, usage, violated
from tests.billing.builders import a_call

NOW = datetime.fromisoformat(AT)
AGO = {"started_at": (NOW - timedelta(seconds=90)).isoformat()}
# A minute costs 0.60; it has lasted for 60 s, and the minute after is paid for ahead.
TWO_MINUTES = 1_200_000_000


def tell(books: Books, phase: str, *, after_s: int = 0, **changes: Any) -> str:
    """A phase of a leg that was told so long before now; the name of the leg."""
    known = books.records[topics.CALL_USAGE]
    event = usage(f"{phase}-{len(known)}", phase=phase, leg_id="one", **AGO) | changes
    written = NOW - timedelta(seconds=after_s)
    one = record(topics.CALL_USAGE, len(known), event)
    stamp = int(written.timestamp() * 1000)
    known.append(msgspec.structs.replace(one, timestamp=stamp))
    books.next[topics.CALL_USAGE] = len(known)
    return name_of("pbx", event)


def held(books: Books, leg: str, nanos: int, *, ended: bool = False) -> None:
    books.holds[leg] = (nanos, 100, ended)
    books.exposure = (0, 0) if ended else (nanos, 1)
    exposure = Decimal(books.exposure[0]).scaleb(-9)
    left = Decimal("149.4") - exposure
    books.public_changes = {"available": f"{left:f}", "exposure": f"{exposure:f}"}


def right(books: Books) -> None:
    held(books, tell(books, "progress"), TWO_MINUTES)


def only_begun(books: Books) -> None:
    held(books, tell(books, "start", duration_s=None), 600_000_000)


def told_out_of_order(books: Books) -> None:
    leg = tell(books, "progress")
    tell(books, "start", duration_s=None)
    held(books, leg, TWO_MINUTES)


def long_silent(books: Books) -> None:
    old = (NOW - timedelta(seconds=200)).isoformat()
    tell(books, "progress", started_at=old)


def free_of_charge(books: Books) -> None:
    tell(books, "progress", kind="free")


def without_a_price(books: Books) -> None:
    tell(books, "progress", callee="+999123456789")


def over(books: Books) -> None:
    leg = tell(books, "progress")
    tell(books, "end", duration_s=0)
    held(books, leg, 0, ended=True)


def over_by_an_end_that_is_long_ago(books: Books) -> None:
    tell(books, "progress")
    tell(books, "end", duration_s=0, started_at="2026-03-02T09:00:00Z")


def over_in_another_topic(books: Books) -> None:
    """Which of the two was booked first is not known."""
    held(books, tell(books, "progress"), TWO_MINUTES)
    event = usage("end", phase="end", leg_id="one", duration_s=0, **AGO)
    books.records[topics.CONFERENCE_USAGE] = [record(topics.CONFERENCE_USAGE, 0, event)]
    books.next[topics.CONFERENCE_USAGE] = 1


def told_of_after_its_end_which_is_repeated(books: Books) -> None:
    tell(books, "end", duration_s=0, leg_id=None, event_id="hung-up")
    leg = tell(books, "progress", leg_id=None)
    tell(books, "end", duration_s=0, leg_id=None, event_id="hung-up")
    held(books, leg, TWO_MINUTES)


def perhaps_included(books: Books) -> None:
    books.command("licences", capability="MCOPSTN2", country="GB", count=1)
    tell(books, "progress")


def not_booked_yet(books: Books) -> None:
    tell(books, "progress")
    books.next[topics.CALL_USAGE] -= 1


@pytest.mark.parametrize(
    "sound",
    [
        right, only_begun, told_out_of_order, long_silent, free_of_charge, without_a_price, over,
        over_by_an_end_that_is_long_ago, over_in_another_topic,
        told_of_after_its_end_which_is_repeated, perhaps_included, not_booked_yet,
    ],
)  # fmt: skip
def test_what_an_open_call_holds_is_sound(sound: Callable[[Books], None]) -> None:
    books = Books()
    sound(books)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def lost(books: Books) -> None:
    tell(books, "progress")


def lost_to_an_end_of_another(books: Books) -> None:
    tell(books, "progress")
    tell(books, "end", duration_s=0, leg_id="two")


def too_little(books: Books) -> None:
    held(books, tell(books, "progress"), 600_000_000)


def too_much_for_what_may_be_included(books: Books) -> None:
    perhaps_included(books)
    held(books, name_of("pbx", {"leg_id": "one"}), TWO_MINUTES + 1)


def kept_after_its_end(books: Books) -> None:
    leg = tell(books, "progress")
    tell(books, "end", duration_s=0)
    held(books, leg, TWO_MINUTES)


def ended_before_its_end(books: Books) -> None:
    held(books, tell(books, "progress"), 0, ended=True)


@pytest.mark.parametrize(
    "breach",
    [
        lost, lost_to_an_end_of_another, too_little, too_much_for_what_may_be_included,
        kept_after_its_end, ended_before_its_end,
    ],
)  # fmt: skip
def test_what_an_open_call_holds_wrongly_is_noticed(breach: Callable[[Books], None]) -> None:
    books = Books()
    breach(books)
    assert violated(books.audited()) == {"holds"}, books.audited().lines()


def test_a_call_that_an_earlier_audit_was_told_of_must_hold_in_the_next() -> None:
    books = Books()
    right(books)
    begun = {topics.COMMAND: 1, topics.NOTIFICATION: 2, topics.CALL_USAGE: 5, topics.RESULT: 1}
    begun |= {topics.LEDGER: 3, topics.BALANCE: 0, topics.REQUESTED: 1}
    earlier = books.checkpoint()
    report, _ = books.audited_from(begun, earlier)
    assert report.exit_code == HOLDS, report.lines()
    books.holds, books.exposure, books.public_changes = {}, (0, 0), {}
    report, _ = books.audited_from(begun, earlier)
    assert violated(report) == {"holds"}


@pytest.mark.parametrize("leg_id", [None, "l-1"])
def test_both_name_a_leg_alike(leg_id: str | None) -> None:
    body = usage("e", leg_id=leg_id, started_at="2026-03-02T12:00:00+02:00")
    event = a_call(
        cause=Cause(topics.CALL_USAGE, 0, 0, "pbx", "e"), leg_id=leg_id, started_at=NOW,
        call_id=body["call_id"], callee=body["callee"],
    )  # fmt: skip
    assert name_of("pbx", body) == holds.leg_of(event)
