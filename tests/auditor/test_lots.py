"""Lots as the auditor folds them: sound stories pass, and every breach is noticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas import topics
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.records import Log
from streams.testbed.auditor.view import Options
from tests.auditor.books import AT, DECK, NAMES, TENANT, Books, record, violated
from tests.billing.test_ledger import STEPS, play
from tests.billing.test_seams import LOTS, told_story

EXPIRED_AT = "2026-03-02T11:00:00Z"
LATER = "2026-03-02T12:00:00Z"
# The lot of the command k1 of the source cli.
MADE = "cba02da539d0c"


@given(st.lists(STEPS, max_size=25))
@search(max_examples=60)
def test_what_the_books_say_of_lots_is_what_the_auditor_folds(
    steps: list[tuple[str, object]],
) -> None:
    entries = play(steps).entries
    ledger = [record(topics.LEDGER, at, value, key=b"t-1") for at, value in enumerate(entries)]
    log = Log(partition=0, rows={}, records={topics.LEDGER: ledger})
    report, _ = audit([log], names=NAMES, partitions=1, deck=DECK)
    assert report.findings["lots"].shown == []
    assert report.counts.get("entries", 0) == len(entries)


@example(
    [
        ("gift", 1, 47, 1, "p"), ("wait", 50), ("call", 1, 4), ("allowance", 1, 1, 1),
        ("void", 0), ("allowance", 1, 1, 1),
    ]
)  # fmt: skip
@given(st.lists(LOTS, max_size=25))
@search(max_examples=100)
def test_what_corrections_do_to_lots_is_what_the_auditor_folds(steps: list[Any]) -> None:
    *_, (book, _) = told_story(steps)
    ledger = [record(topics.LEDGER, at, value, key=b"t-1") for at, value in enumerate(book.entries)]
    causes = [json.loads(value)["caused_by"] for value in book.entries]
    middle = len(ledger) // 2
    # The entries of one event are one transaction: no audit ends between them.
    while 0 < middle < len(ledger) and causes[middle - 1] == causes[middle]:
        middle += 1
    earlier = None
    for part in (ledger[:middle], ledger[middle:]):
        log = Log(partition=0, rows={}, records={topics.LEDGER: part})
        options = Options(checkpoint_from=None if earlier is None else Path("earlier"))
        report, reached = audit(
            [log], names=NAMES, partitions=1, deck=DECK, options=options, earlier=earlier
        )
        earlier = json.loads(json.dumps(reached))
        for law in ("lots", "conservation", "sequence", "chain"):
            assert report.findings[law].shown == []


def used(lot: str, amount: str, left: str) -> dict[str, str]:
    return {"id": lot, "amount": amount, "left": left}


class Story(Books):
    """The books, and beside them a lot of 10 that expired an hour ago; a call of before it has
    just taken 0.6 of it. `steps` are its entries."""

    def __init__(self) -> None:
        super().__init__()
        call = (topics.CALL_USAGE, 4, "pbx", "e4")
        tick = ("tick", -1, "tick", EXPIRED_AT)
        rate = {"version": DECK.version, "prefix": "4420", "duration_s": 60}
        self.entries += [
            self.entry(
                4, "grant", "10", "159.4", (topics.COMMAND, 1, "cli", "k1"),
                expires_at=EXPIRED_AT, grants=[used(MADE, "10", "10")],
            ),
            self.entry(
                5, "expiry", "-10", "149.4", tick, at=EXPIRED_AT, booked_at=EXPIRED_AT,
                grants=[used(MADE, "-10", "0")],
            ),
            self.entry(
                6, "expiry_reopened", "0.6", "150", call, booked_at=LATER,
                expires_at=EXPIRED_AT, grants=[used(MADE, "0.6", "0.6")],
            ),
            self.entry(
                7, "charge", "-0.6", "149.4", call, booked_at=LATER, rate=rate,
                grants=[used(MADE, "-0.6", "0")],
            ),
        ]  # fmt: skip
        self.grant: dict[str, Any] = {
            "command": "grant", "command_id": "k1", "source": "cli", "expires_at": EXPIRED_AT,
            "amount": {"amount": "10", "currency": "USD"},
        }  # fmt: skip
        self.next |= {topics.COMMAND: 2, topics.CALL_USAGE: 5}

    def log(self) -> Log:
        answer = {"notice": "command_applied", "command_id": "k1"}
        self.records[topics.COMMAND].append(record(topics.COMMAND, 1, self.grant))
        self.records[topics.NOTIFICATION].append(record(topics.NOTIFICATION, 1, answer))
        call = {"event_id": "e4", "source": "pbx", "tenant_id": TENANT, "call_id": "c",
                "kind": "international", "callee": "+442079460018", "started_at": AT,
                "duration_s": 60}  # fmt: skip
        self.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, call))
        return super().log()


def test_a_lot_that_is_reopened_for_late_usage_is_sound() -> None:
    assert violated(Story().audited()) == set()


def test_a_grant_that_took_another_commands_id_was_never_granted() -> None:
    story = Story()
    usurper = story.grant | {"amount": {"amount": "99", "currency": "USD"}}
    taken = record(topics.COMMAND, 2, usurper)
    story.records[topics.COMMAND].append(taken)
    story.records[topics.dead_letters_of(topics.COMMAND)] = [
        record(
            topics.dead_letters_of(topics.COMMAND), 0, taken.value,
            credits_dlq_partition="0", credits_dlq_offset="2", credits_dlq_reason="conflict",
            credits_dlq_path="$", credits_dlq_failed_at=AT,
        )
    ]  # fmt: skip
    story.records[topics.NOTIFICATION].append(
        record(topics.NOTIFICATION, 2, {"notice": "command_refused", "command_id": "k1"})
    )
    story.next |= {topics.COMMAND: 3}
    assert violated(story.audited()) == set()


def renewed(amount: str, name: str = "k1") -> dict[str, Any]:
    """What an audit after a checkpoint says of an allowance of 10 that time has set back."""
    books = Books()
    asked = {
        "command": "grant", "command_id": "k1", "source": "cli", "every_days": 1,
        "effective_at": EXPIRED_AT, "amount": {"amount": "10", "currency": "USD"},
    }  # fmt: skip
    answer = {"notice": "command_applied", "command_id": "k1", "at": AT}
    books.records[topics.COMMAND].append(record(topics.COMMAND, 1, asked))
    books.records[topics.NOTIFICATION].append(record(topics.NOTIFICATION, 1, answer))
    books.next[topics.COMMAND] = 2
    earlier = books.checkpoint()
    lot = MADE if name == "k1" else "c111111111111"
    tick = ("tick", -1, "tick", EXPIRED_AT)
    books.entries.append(
        books.entry(4, "grant", amount, str(149.4 + int(amount)), tick, at=EXPIRED_AT,
                    booked_at=EXPIRED_AT, grants=[used(lot, amount, amount)])
    )  # fmt: skip
    left = [["g1", "paid", 100, 149_400_000_000, 149_400_000_000, AT, None, AT]]
    books.row_changes[6] = [*left, [lot, "promo", 100, 0, int(amount) * 10**9, AT]]
    report, _ = books.audited_from({topics.LEDGER: 3, topics.COMMAND: 2}, earlier)
    return {law: found.violations for law, found in report.findings.items() if found.violations}


@pytest.mark.parametrize(
    ("amount", "name", "red"),
    [("10", "k1", {}), ("11", "k1", {"lots": 1}), ("5", "k2", {"cause": 1})],
)
def test_what_was_asked_for_before_a_checkpoint_is_judged_when_it_comes(
    amount: str, name: str, red: dict[str, int]
) -> None:
    assert renewed(amount, name) == red


def paid_after_its_end(story: Story) -> None:
    story.entries[6]["at"] = LATER


def reopened_for_later_usage(story: Story) -> None:
    story.entries[5]["at"] = EXPIRED_AT


def reopened_after_the_grace(story: Story) -> None:
    story.entries[5]["booked_at"] = "2026-03-04T11:00:00Z"


def reopened_though_it_never_expired(story: Story) -> None:
    story.entries[4] |= {"kind": "adjustment"}


def ended_too_early(story: Story) -> None:
    story.entries[4] |= {"at": AT, "booked_at": AT}


def left_open(story: Story) -> None:
    story.entries[6]["grants"] = [used("g1", "-0.6", "148.8")]


def another_rest(story: Story) -> None:
    story.entries[3]["grants"] = [used(MADE, "10", "9")]


def below_zero(story: Story) -> None:
    story.entries[6]["grants"] = [used(MADE, "-1.2", "-0.6"), used("g1", "0.6", "150")]


def a_lot_beside_an_overdraft(story: Story) -> None:
    story.entries[3] |= {"overdraft_after": "1"}


def another_amount(story: Story) -> None:
    story.grant["amount"]["amount"] = "11"


def before_its_time(story: Story) -> None:
    story.grant["effective_at"] = EXPIRED_AT


def never_given(story: Story) -> None:
    for entry in story.entries[3:]:
        entry["grants"][0]["id"] = "c000000000000"


def given_twice(story: Story) -> None:
    more = story.entry(
        8, "grant", "10", "159.4", ("tick", -1, "tick", LATER), at=LATER, booked_at=LATER,
        grants=[used(MADE, "10", "10")],
    )  # fmt: skip
    story.entries.append(more)


def another_end(story: Story) -> None:
    story.grant["expires_at"] = "2026-03-02T11:30:00Z"


def an_end_though_it_has_none(story: Story) -> None:
    del story.grant["expires_at"]


def test_a_lot_that_nobody_asked_for_is_noticed() -> None:
    story = Story()
    tick = ("tick", -1, "tick", LATER)
    lot = used("c111111111111", "5", "5")
    story.entries.append(
        story.entry(8, "grant", "5", "154.4", tick, at=LATER, booked_at=LATER, grants=[lot])
    )
    left = [["g1", "paid", 100, 149_400_000_000, 149_400_000_000, AT, None, AT]]
    story.row_changes[6] = [*left, ["c111111111111", "promo", 100, 5 * 10**9, 5 * 10**9, AT]]
    assert violated(story.audited()) == {"cause"}


BREACHES: list[Callable[[Story], None]] = [
    another_end,
    an_end_though_it_has_none,
    paid_after_its_end,
    reopened_for_later_usage,
    reopened_after_the_grace,
    reopened_though_it_never_expired,
    ended_too_early,
    left_open,
    another_rest,
    below_zero,
    a_lot_beside_an_overdraft,
    another_amount,
    before_its_time,
    never_given,
    given_twice,
]


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_a_breach_is_noticed(breach: Callable[[Story], None]) -> None:
    story = Story()
    breach(story)
    assert "lots" in violated(story.audited())


class Returned(Story):
    """And that call is corrected an hour later: it was free. What returned to the lot expires."""

    def __init__(self) -> None:
        super().__init__()
        place = (topics.CALL_USAGE, 5, "pbx", "fix")
        links = {"corrects": "e4", "entry": 7}
        self.booked = "2026-03-02T13:00:00Z"
        self.entries += [
            self.entry(
                8, "reversal", "0.6", "150", place, booked_at=self.booked, links=links,
                grants=[used(MADE, "0.6", "0.6")],
            ),
            self.entry(
                9, "expiry", "-0.6", "149.4", place, at=EXPIRED_AT, booked_at=self.booked,
                grants=[used(MADE, "-0.6", "0")],
            ),
        ]  # fmt: skip
        self.next[topics.CALL_USAGE] = 6

    def log(self) -> Log:
        free = {"event_id": "fix", "source": "pbx", "tenant_id": TENANT, "call_id": "c",
                "kind": "free", "phase": "correction", "corrects": "e4", "started_at": AT,
                "duration_s": 60}  # fmt: skip
        log = super().log()
        log.records[topics.CALL_USAGE] = [
            *log.records[topics.CALL_USAGE], record(topics.CALL_USAGE, 5, free),
        ]  # fmt: skip
        return log

    def void(self) -> None:
        """The lot was voided, in place of its expiry."""
        self.entries[3]["expires_at"] = "2027-03-02T00:00:00Z"
        self.entries[4] |= {"kind": "void", "at": AT}
        del self.entries[5:7]


def test_what_returned_to_a_dead_lot_and_expired_again_is_sound() -> None:
    report = Returned().audited()
    assert violated(report) == set(), report.lines()


def test_what_stays_in_a_dead_lot_is_found() -> None:
    story = Returned()
    del story.entries[-1]
    assert violated(story.audited()) == {"lots"}


@pytest.mark.parametrize("again", [True, False])
def test_what_stays_in_a_voided_lot_is_found_also_after_a_checkpoint(again: bool) -> None:
    cause = ("tick", -1, "tick", AT)
    steps = [
        Books.entry(1, "grant", "10", "10", cause, grants=[used("g1", "10", "10")]),
        Books.charge(Books(), 2, 0, "e1", "-0.6", "9.4") | {"grants": [used("g1", "-0.6", "9.4")]},
        Books.entry(3, "void", "-9.4", "0", cause, grants=[used("g1", "-9.4", "0")]),
        Books.entry(
            4, "reversal", "0.6", "0.6", (topics.CALL_USAGE, 1, "pbx", "fix"),
            links={"corrects": "e1", "entry": 2}, grants=[used("g1", "0.6", "0.6")],
        ),
        Books.entry(
            5, "void", "-0.6", "0", (topics.CALL_USAGE, 1, "pbx", "fix"),
            grants=[used("g1", "-0.6", "0")],
        ),
    ]  # fmt: skip
    books = Books()
    books.entries = steps if again else steps[:4]
    values, _ = books.ledger()
    ledger = [record(topics.LEDGER, at, value) for at, value in enumerate(values)]
    earlier = None
    for part in (ledger[:3], ledger[3:]):
        log = Log(partition=0, rows={}, records={topics.LEDGER: part})
        report, earlier = audit([log], names=NAMES, partitions=1, deck=DECK, earlier=earlier)
        earlier = json.loads(json.dumps(earlier))
    assert bool(report.findings["lots"].shown) is not again
