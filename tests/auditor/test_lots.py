"""Lots as the auditor folds them: sound stories pass, and every breach is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas import topics
from streams.testbed.auditor import Log, audit
from tests.auditor.books import AT, DECK, NAMES, TENANT, Books, record, violated
from tests.billing.test_ledger import STEPS, play

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


BREACHES: list[Callable[[Story], None]] = [
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
