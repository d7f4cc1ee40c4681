"""What follows declines, held against the topics: pauses, back-offs, the method that is next."""

import json
import random
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas import topics
from schemas.commands import RechargePolicy
from schemas.funding import Status
from schemas.notices import Withheld
from schemas.usage import Phase
from streams.billing import recharge
from streams.billing.outcomes import Finding
from streams.billing.recharge import recharge_id
from streams.billing.stages import Stage
from streams.testbed.auditor import settled, standings
from streams.testbed.auditor.verdict import HOLDS
from tests.auditor.books import AT, NAMESPACE, RECHARGE, TENANT, record, violated
from tests.auditor.test_guards import END, Witnessed, and_more, runs_short, without
from tests.auditor.test_recharges import BEFORE, BEGUN, LATER, Asking
from tests.billing.builders import (
    NOW,
    a_call,
    a_command,
    a_fund,
    a_payment,
    a_result,
    an_adjustment,
    opening,
    settings,
)
from tests.billing.test_stages import act

AGAIN = str(uuid.uuid5(NAMESPACE, f"{TENANT}/1/2"))
NEXT = str(uuid.uuid5(NAMESPACE, f"{TENANT}/2/1"))
IN_AN_HOUR = "2026-03-02T11:00:00Z"
AFTER_IT = "2026-03-02T11:00:01Z"


class Declining(Asking):
    """The books of a tenant with two cards. The first declines, so the second is asked at once and
    is in flight; calls of `LATER` follow."""

    def __init__(self) -> None:
        super().__init__()
        del self.entries[2]
        for seq, (entry, after) in enumerate(zip(self.entries[2:], ("74.2", "49"), strict=True), 3):
            entry |= {"seq": seq, "balance_after": after}
        self.methods = ["card-1", "card-2"]
        self.code: str | None = None
        self.first["payment_method"] = "card-1"
        self.second = self.request(
            1, 2, AGAIN, **self.asked, requested_at=AT, caused_by="pay/r1"
        ) | {"payment_method": "card-2", "reason": "retry"}
        self.declined: dict[str, Any] = {
            "notice": "recharge_declined", "recharge_id": RECHARGE, "at": AT,
            "caused_by": "pay/r1",
        }  # fmt: skip
        self.asks: dict[str, Any] = {
            "notice": "recharge_requested", "recharge_id": AGAIN, "at": AT, "amount": "50",
            "caused_by": "pay/r1",
        }  # fmt: skip
        self.notices = [
            {"notice": "command_applied", "command_id": "policy", "at": BEFORE,
             "caused_by": "cli/policy"},
            {"notice": "settings_changed", "caused_by": "cli/policy", "at": BEFORE,
             "policy_version": 1},
            {"notice": "recharge_requested", "recharge_id": RECHARGE, "at": AT, "amount": "50",
             "caused_by": "pbx/e1"},
            self.declined,
            self.asks,
        ]  # fmt: skip
        self.public_changes |= {"available": "49", "recharge_id": AGAIN}

    def log(self) -> Any:
        opened = self.records[topics.NOTIFICATION][0]
        told = json.loads(opened.value or b"") | {"at": BEFORE, "caused_by": "cli/open"}
        self.records[topics.NOTIFICATION][0] = record(topics.NOTIFICATION, 0, told)
        answer = self.result("r1", status="declined", amount=None, decline_code=self.code)
        self.records[topics.RESULT] = [record(topics.RESULT, 0, answer)]
        if self.code is not None:
            self.declined["decline_code"] = self.code
        found = super().log()
        command = json.loads(found.records[topics.COMMAND][1].value)
        found.records[topics.COMMAND][1] = record(
            topics.COMMAND, 1, command | {"payment_methods": self.methods}
        )
        return found

    def commanded(self) -> dict[int, Any]:
        """The command of `log` names methods as well."""
        found = super().commanded()
        return found | {settled.METHODS: self.methods}

    def asks_later(self, at: str = LATER, *, epoch: int = 1, **changes: Any) -> None:
        """The second request was made by a call of later."""
        name = AGAIN if epoch == 1 else NEXT
        self.second |= {
            "requested_at": at, "caused_by": "pbx/e9", "balance": "49", "available": "49",
            "recharge_id": name, "epoch": epoch, "attempt": 2 if epoch == 1 else 1,
            "reason": "retry" if epoch == 1 else "below_trigger",
        } | changes  # fmt: skip
        self.asks |= {"at": at, "caused_by": "pbx/e9", "recharge_id": name}
        self.public_changes |= {"recharge_id": name, "as_of": at}

    def calls_end(self, at: str) -> None:
        """The calls of later ended even later."""
        for entry in self.entries[2:]:
            entry["booked_at"] = at
        self.position_changes["now"] = at

    def tells(self, notice: str, at: str = AT, cause: str = "pay/r1", **said: Any) -> None:
        """A notice before the last request."""
        place = self.notices.index(self.asks) if self.asks in self.notices else len(self.notices)
        self.notices.insert(place, {"notice": notice, "at": at, "caused_by": cause} | said)

    def commands(self, word: str, at: str, **asked: Any) -> None:
        """One command more, which was applied before the last request."""
        more = {"command": word, "command_id": word, "source": "cli"} | asked
        and_more(self, topics.COMMAND, more)
        self.next[topics.COMMAND] += 1
        self.tells("command_applied", at, f"cli/{word}", command_id=word)


def the_same_card_again(books: Declining) -> None:
    books.second["payment_method"] = "card-1"


def another_card_first(books: Declining) -> None:
    books.first["payment_method"] = "card-2"


def after_a_decline(books: Declining) -> None:
    """The only card was declined, and is asked again in an hour."""
    books.methods = ["card-1"]
    books.declined["retry_at"] = IN_AN_HOUR
    books.second["payment_method"] = "card-1"


def in_the_back_off(books: Declining) -> None:
    after_a_decline(books)
    books.asks_later()


def in_an_epoch_that_begins_in_the_back_off(books: Declining) -> None:
    after_a_decline(books)
    books.asks_later(epoch=2)


def not_at_the_time_that_was_told(books: Declining) -> None:
    after_a_decline(books)
    books.declined["retry_at"] = "2026-03-02T10:30:00Z"
    books.asks_later(AFTER_IT)
    books.calls_end(AFTER_IT)


def told_to_wait_though_another_card_is_next(books: Declining) -> None:
    books.declined["retry_at"] = IN_AN_HOUR


def told_paused(books: Declining, rule: str = "terminal_decline") -> None:
    """The decline has paused recharges, so the notice says, and nothing more is asked for."""
    books.tells("recharge_paused", recharge_id=RECHARGE, rule=rule)
    books.notices.remove(books.declined)
    books.notices.insert(-1, books.declined)
    books.withheld(withheld="paused", caused_by="pbx/e9")


def a_lost_card_that_pauses_nothing(books: Declining) -> None:
    books.code = "lost_card"


def the_only_card_has_expired_and_pauses_nothing(books: Declining) -> None:
    in_the_back_off(books)
    books.asks_later(AFTER_IT)
    books.calls_end(AFTER_IT)
    books.code = "expired_card"


def paused_though_another_card_is_left(books: Declining) -> None:
    books.code = "expired_card"
    told_paused(books)


def paused_by_the_wrong_rule(books: Declining) -> None:
    books.code = "fraud"
    told_paused(books, "declines_in_row")


def paused_by_nothing(books: Declining) -> None:
    books.tells("recharge_paused", LATER, "pbx/e9", rule="declines_in_row")
    books.withheld(withheld="paused", caused_by="pbx/e9")


def asked_while_paused(books: Declining) -> None:
    books.code = "stolen_card"
    books.tells("recharge_paused", recharge_id=RECHARGE, rule="terminal_decline")
    books.notices.remove(books.declined)
    books.notices.insert(-1, books.declined)
    books.asks_later(epoch=2, payment_method="card-1")


def asked_though_a_person_has_denied_it(books: Declining) -> None:
    books.tells("recharge_paused", LATER, "cli/deny", rule="denied")
    books.commands("deny", LATER)
    books.asks_later(epoch=2, payment_method="card-1")


def told_that_it_is(books: Declining, reason: str) -> None:
    books.withheld(withheld=reason, caused_by="pbx/e9")


def withheld_for_a_pause_that_is_none(books: Declining) -> None:
    told_that_it_is(books, "paused")


def withheld_for_a_pause_that_a_payment_has_ended(books: Declining) -> None:
    asked_while_paused(books)
    books.entries[2:] = [
        books.entry(3, "purchase", "0.5", "99.9", (topics.COMMAND, 2, "cli", "book_payment"),
                    payment_id="w") | {"booked_at": LATER},
    ]  # fmt: skip
    del books.records[topics.CALL_USAGE][4:]
    books.next[topics.CALL_USAGE] = 4
    books.commands(
        "book_payment", LATER, payment_id="w", amount={"amount": "0.5", "currency": "USD"}
    )
    books.withheld(withheld="paused", caused_by="cli/book_payment")
    books.public_changes["available"] = "99.9"


def withheld_for_a_back_off_that_is_none(books: Declining) -> None:
    told_that_it_is(books, "cooling")


def withheld_for_a_back_off_that_has_passed(books: Declining) -> None:
    after_a_decline(books)
    books.withheld(withheld="cooling", caused_by="pbx/e9", at=AFTER_IT)
    books.calls_end(AFTER_IT)


def withheld_for_another_reason_than_the_pause(books: Declining) -> None:
    books.code = "lost_card"
    told_paused(books)
    books.notices[-1]["withheld"] = "cooling"


def withheld_for_cards_that_were_hardly_ever_declined(books: Declining) -> None:
    told_that_it_is(books, "attempts_exhausted")


def stale_and_asked_for_in_one_batch(books: Declining) -> None:
    books.asks_later()
    books.second["payment_method"] = "card-2"
    books.tells("recharge_withheld", LATER, "pbx/e8", withheld="stale", policy_version=1)


BREACHES: list[Callable[[Declining], None]] = [
    the_same_card_again,
    another_card_first,
    in_the_back_off,
    in_an_epoch_that_begins_in_the_back_off,
    not_at_the_time_that_was_told,
    told_to_wait_though_another_card_is_next,
    a_lost_card_that_pauses_nothing,
    the_only_card_has_expired_and_pauses_nothing,
    paused_though_another_card_is_left,
    paused_by_the_wrong_rule,
    paused_by_nothing,
    asked_while_paused,
    asked_though_a_person_has_denied_it,
    withheld_for_a_pause_that_is_none,
    withheld_for_a_pause_that_a_payment_has_ended,
    withheld_for_a_back_off_that_is_none,
    withheld_for_a_back_off_that_has_passed,
    withheld_for_another_reason_than_the_pause,
    withheld_for_cards_that_were_hardly_ever_declined,
    stale_and_asked_for_in_one_batch,
]


@pytest.mark.parametrize("breach", BREACHES)
def test_what_a_decline_does_not_lead_to_is_noticed(breach: Callable[[Declining], None]) -> None:
    books = Declining()
    breach(books)
    report = books.audited()
    assert violated(report) == {"recharge"}, report.lines()
    assert report.findings["recharge"].violations == 1, report.lines()


def nothing_more(books: Declining) -> None:
    """The next card is asked at once."""


def after_the_back_off(books: Declining) -> None:
    after_a_decline(books)
    books.asks_later(AFTER_IT)
    books.calls_end(AFTER_IT)


def withheld_in_the_back_off(books: Declining) -> None:
    after_a_decline(books)
    told_that_it_is(books, "cooling")


def a_lost_card_that_pauses(books: Declining) -> None:
    books.code = "lost_card"
    told_paused(books)


def the_only_card_has_expired(books: Declining) -> None:
    books.methods = ["card-1"]
    books.code = "expired_card"
    told_paused(books)


def denied_by_a_person(books: Declining) -> None:
    books.tells("recharge_paused", LATER, "cli/deny", rule="denied")
    books.commands("deny", LATER)
    books.withheld(withheld="paused", caused_by="cli/deny")


def asked_after_a_payment_has_ended_the_pause(books: Declining) -> None:
    withheld_for_a_pause_that_a_payment_has_ended(books)
    del books.notices[-1]
    asks = {"requested_at": LATER, "caused_by": "cli/book_payment", "recharge_id": NEXT}
    books.second = books.first | asks | {"epoch": 2, "balance": "99.9", "available": "99.9"}
    books.asks |= {"at": LATER, "caused_by": "cli/book_payment", "recharge_id": NEXT}
    books.notices.append(books.asks)
    books.public_changes |= {"recharge_state": "requested", "recharge_id": NEXT}


def stale_in_the_batch_before(books: Declining) -> None:
    stale_and_asked_for_in_one_batch(books)
    books.notices[-2]["at"] = "2026-03-02T10:00:02Z"


def stale_and_asked_for_with_the_end_of_a_batch_between(books: Declining) -> None:
    """Where a transaction ends its topic has an offset without a record."""
    stale_and_asked_for_in_one_batch(books)
    log = books.log

    def apart() -> Any:
        found = log()
        told = found.records[topics.NOTIFICATION]
        told[-1] = replace(told[-1], offset=told[-1].offset + 1)
        return found

    books.log = apart  # type: ignore[method-assign]


SOUND: list[Callable[[Declining], None]] = [
    nothing_more,
    after_the_back_off,
    withheld_in_the_back_off,
    a_lost_card_that_pauses,
    the_only_card_has_expired,
    denied_by_a_person,
    asked_after_a_payment_has_ended_the_pause,
    stale_in_the_batch_before,
    stale_and_asked_for_with_the_end_of_a_batch_between,
]


@pytest.mark.parametrize("sound", SOUND)
def test_what_a_decline_leads_to_is_sound(sound: Callable[[Declining], None]) -> None:
    books = Declining()
    sound(books)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


# -- what the topics do not tell ------------------------------------------------------------------


def gone(books: Declining, topic: str, count: int) -> None:
    """So many records of a topic, all of them, have left it."""
    books.starts = {topic: count}
    log = books.log

    def without() -> Any:
        found = log()
        found.records[topic] = []
        return found

    books.log = without  # type: ignore[method-assign]


def commands_are_gone(books: Declining) -> None:
    """Nobody knows the cards, nor what else was commanded."""
    books.next[topics.COMMAND] = 3
    gone(books, topics.COMMAND, 3)


# Of these notices and results are proof enough, whatever was commanded.
NEED_NO_COMMAND = (
    a_lost_card_that_pauses_nothing,
    paused_by_the_wrong_rule,
    paused_by_nothing,
    asked_while_paused,
    withheld_for_a_pause_that_is_none,
    withheld_for_another_reason_than_the_pause,
    stale_and_asked_for_in_one_batch,
)


@pytest.mark.parametrize("breach", BREACHES)
def test_where_commands_are_gone_only_what_needs_none_is_a_violation(
    breach: Callable[[Declining], None],
) -> None:
    books = Declining()
    breach(books)
    commands_are_gone(books)
    report = books.audited()
    assert ("recharge" in violated(report)) is (breach in NEED_NO_COMMAND), report.lines()


def not_below_the_position(books: Declining) -> None:
    books.position_changes["now"] = BEFORE


def notices_are_gone(books: Declining) -> None:
    gone(books, topics.NOTIFICATION, 99)


def results_are_gone(books: Declining) -> None:
    """Some of them may have paid for something without a word."""
    gone(books, topics.RESULT, 1)


@pytest.mark.parametrize("gap", [not_below_the_position, notices_are_gone, results_are_gone])
@pytest.mark.parametrize("breach", [one for one in BREACHES if "stale" not in one.__name__])
def test_what_the_topics_do_not_prove_is_no_violation(
    breach: Callable[[Declining], None], gap: Callable[[Declining], None]
) -> None:
    books = Declining()
    breach(books)
    gap(books)
    report = books.audited()
    assert "recharge" not in violated(report), report.lines()


# -- audits that go on from one another -----------------------------------------------------------


def first_half(breach: Callable[[Declining], None]) -> Any:
    """What an audit hands on that has seen the decline, and nothing of later."""
    once = Declining()
    breach(once)
    del once.entries[2:]
    del once.records[topics.CALL_USAGE][4:]
    once.next[topics.CALL_USAGE] = 4
    once.position_changes = {"now": AT}
    once.second = {}
    once.public_changes = {"available": "99.4", "policy_version": 1, "as_of": LATER}
    once.notices = [one for one in once.notices if one["at"] in (BEFORE, AT)]
    return {
        **BEGUN,
        topics.LEDGER: 2,
        topics.NOTIFICATION: 1 + len(once.notices),
    }, once.checkpoint()


def of_before(checkpoint: dict[str, Any]) -> None:
    """As it was written before audits remembered where recharges stand."""
    for known in checkpoint.values():
        for member in ("knows_standings", "standings"):
            known["recharges"].pop(member)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "breach",
    [
        in_the_back_off,
        in_an_epoch_that_begins_in_the_back_off,
        asked_while_paused,
        withheld_for_a_pause_that_is_none,
        withheld_for_a_back_off_that_has_passed,
        withheld_for_cards_that_were_hardly_ever_declined,
    ],
)
def test_what_an_earlier_audit_has_seen_is_remembered(
    breach: Callable[[Declining], None], known: bool
) -> None:
    begun, earlier = first_half(breach)
    if not known:
        of_before(earlier)
    books = Declining()
    breach(books)
    report, later = books.audited_from(begun, earlier)
    assert violated(report) == ({"recharge"} if known else set()), report.lines()
    # What was not known then is not known from then on, either.
    assert later["0"]["recharges"]["knows_standings"] is known


def test_what_is_paid_without_a_word_makes_unknown_where_recharges_stand() -> None:
    """A late success of money that was booked by hand before ends the back-off."""
    book = walked([])
    asked = runs_short(book, NOW)
    book.feed(a_command(settings(1, payment_methods=["card-1"])), NOW)
    book.feed(a_result(asked, Status.DECLINED, occurred_at=NOW), NOW)
    book.feed(a_command(a_payment("1", "wire")), NOW)
    later = NOW + timedelta(minutes=5)
    book.feed(a_result(asked, amount="1", payment_id="wire", occurred_at=later), later)
    runs_short(book, later + timedelta(minutes=1))
    assert book.requests[-1].attempt == 1
    assert book.audited(END) == []


# -- whatever happens -----------------------------------------------------------------------------
CARDS: tuple[list[str], ...] = (
    ["card-1"],
    ["card-1", "card-2"],
    ["card-2", "card-1"],
    ["card-3", "card-1", "card-2"],
    [],
)
CODES = (None, "insufficient_funds", "do_not_honor", "expired_card", "lost_card")
RULES: tuple[dict[str, Any], ...] = (
    {"cooldown_s": 0},
    {"cooldown_s": 600},
    {"cooldown_s": 60, "velocity": {"premium": "40"}},
    {"cooldown_s": 0, "trigger": "50"},
    {"cooldown_s": 0, "enabled": False},
)
ACTIONS = (
    *("use", "use", "use", "decline", "decline", "decline", "decline", "succeed", "end"),
    *("wait", "wait", "wait long", "late", "pay", "fund", "answer fund", "adjust", "talk"),
    *("cards", "rules", "spend", "approve", "deny", "resolve", "close", "behind", "audit"),
    "wait days",
)
WALKS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 50)), min_size=6, max_size=50)


def walked(walk: list[tuple[str, int]]) -> Witnessed:
    """What became of a tenant whose cards are declined again and again."""
    book, now = Witnessed(), NOW
    book.feed(a_command(opening(opening_balance="120")), now)
    said: dict[str, Any] = {"enabled": True, "trigger": "100", "amount": "60", "max_per_day": 1_000}
    policy = RechargePolicy(**(said | RULES[0]))
    book.feed(a_command(settings(0, policy=policy, payment_methods=CARDS[1])), now)
    for at, (action, size) in enumerate(walk):
        account = book.account
        assert account is not None
        asked = account.standing.recharging.asked
        version = account.standing.settings_version
        if action.startswith("wait"):
            hours = {"wait": 0, "wait long": size % 9, "wait days": 24 * size}[action]
            now += timedelta(hours=hours, minutes=3 * size)
        match action:
            case "decline" if asked is not None:
                code = CODES[size % len(CODES)] if size % 3 == 0 else None
                book.feed(
                    a_result(
                        asked.recharge_id, Status.DECLINED, decline_code=code, occurred_at=now
                    ),
                    now,
                )
            case "succeed" if asked is not None:
                book.feed(a_result(asked.recharge_id, amount=str(size + 1), occurred_at=now), now)
            case "end" if asked is not None:
                status = (Status.CANCELLED, Status.EXPIRED)[size % 2]
                book.feed(a_result(asked.recharge_id, status, occurred_at=now), now)
            case "late" if account.standing.recharging.attempts:
                known = account.standing.recharging.attempts
                one = known[size % len(known)]
                of = recharge_id(account.tenant_id, one.epoch, one.attempt)
                # One payment may be said to answer several requests.
                payment = "shared" if size % 7 == 0 else f"p-{of}"
                late = a_result(of, amount=str(1 + size), payment_id=payment, occurred_at=now)
                book.feed(late, now)
            case "fund":
                book.feed(a_command(a_fund(str(50 + size)), f"fund-{at}"), now)
            case "answer fund" if account.standing.funds:
                fund = account.standing.funds[size % len(account.standing.funds)]
                status = (Status.SUCCEEDED, Status.DECLINED, Status.CANCELLED)[size % 3]
                book.feed(a_result(fund.recharge_id, status, occurred_at=now), now)
            case "adjust":
                book.feed(a_command(an_adjustment(str(4 * size - 90))), now)
            case "talk":
                minutes = timedelta(minutes=size)
                talk = a_call(
                    phase=Phase.PROGRESS, leg_id=f"l{at}", started_at=now - minutes,
                    duration_s=60 * size,
                )  # fmt: skip
                book.feed(talk, now)
            case "cards":
                cards = CARDS[size % len(CARDS)]
                book.feed(a_command(settings(version, payment_methods=cards)), now)
            case "rules":
                policy = RechargePolicy(**(said | RULES[size % len(RULES)]))
                named = {} if size % 2 else {"payment_methods": CARDS[size % len(CARDS)]}
                book.feed(a_command(settings(version, policy=policy, **named)), now)
            case "behind":
                minute = timedelta(minutes=1)
                late_call = a_call(started_at=now - size * minute, duration_s=60 * size)
                book.feed(late_call, now, stale=True)
            case "audit":
                now += timedelta(seconds=1)
                book.audited(now)
                now += timedelta(seconds=1)
            case "decline" | "succeed" | "end" | "late" | "answer fund":
                pass
            case _:
                act(book, "wait" if action == "wait days" else action, size, at, now)
    return book


def soon_worn_out() -> ExitStack:
    """Cards that may be declined twice, here and there."""
    stack = ExitStack()
    stack.enter_context(patch.object(recharge, "DECLINES_PER_METHOD", 2))
    stack.enter_context(patch.object(standings, "_MOST_DECLINES", 2))
    return stack


@pytest.mark.parametrize("worn", [nullcontext, soon_worn_out])
@given(WALKS)
@hypothesis.settings(max_examples=300)
def test_whatever_declines_lead_to_is_sound(
    worn: Callable[[], AbstractContextManager[Any]], walk: list[tuple[str, int]]
) -> None:
    with worn():
        assert walked(walk).audited(END) == []


def test_a_card_is_declined_fifteen_times_in_a_month_and_no_more() -> None:
    """The last day on which the first decline counts, and the next."""
    for later, asked in ((30, "card-2"), (31, "card-1")):
        book = walked([])
        for at in range(16):
            now = NOW if at < 15 else NOW + timedelta(days=later)
            asked_for = runs_short(book, now)
            if at < 15:
                book.feed(a_result(asked_for, Status.DECLINED, occurred_at=now), now)
                paid = book.requests[-1].recharge_id
                book.feed(a_result(paid, amount="60", occurred_at=now), now)
        assert book.requests[-1].payment_method == asked
        assert book.audited(END) == []


def test_of_more_methods_than_eight_nobody_knows_how_often_they_were_declined() -> None:
    with soon_worn_out():
        book = walked([])
        for version, card in enumerate(("card-x", "card-x", *map(str, range(8)), "card-x"), 1):
            book.feed(a_command(settings(version, payment_methods=[card])), NOW)
            asked = runs_short(book, NOW)
            assert book.requests[-1].payment_method == card
            book.feed(a_result(asked, Status.DECLINED, occurred_at=NOW), NOW)
            # The epoch is over, and so is its back-off.
            book.feed(a_command(an_adjustment("150")), NOW)
        assert book.audited(END) == []


# -- the product, taken apart ---------------------------------------------------------------------


def changed(owner: Any, name: str, new: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(owner, name, new)


def after_declines(**changes: Any) -> AbstractContextManager[Any]:
    """The product, in another state after declines that do not pause it."""
    declined = recharge._declined

    def otherwise(draft: Any, code: str | None) -> None:
        declined(draft, code)
        if draft.account.standing.recharging.stage != Stage.PAUSED:
            recharge._move(draft, **changes)

    return patch.object(recharge, "_declined", otherwise)


def considering(stage: Stage) -> AbstractContextManager[Any]:
    """The product, free to ask in a stage in which it may not."""
    consider = recharge.consider

    def hasty(draft: Any, **terms: Any) -> None:
        if draft.account.standing.recharging.stage == stage:
            recharge._move(draft, stage=Stage.IDLE, until=None)
        consider(draft, **terms)

    return patch.object(recharge, "consider", hasty)


def guarded(guard: Withheld) -> AbstractContextManager[Any]:
    """The product, withholding everything for one reason."""
    others = tuple(
        (one, (lambda _: Finding(True)) if one is guard else asked)
        for one, asked in recharge.GUARDS
    )
    return patch.object(recharge, "GUARDS", others)


@pytest.mark.parametrize(
    ("broken", "seen"),
    [
        (changed(recharge, "PAUSE_AFTER_DECLINES", 99), "pauses nothing"),
        (changed(recharge, "TERMINAL_CODES", frozenset()), "pauses nothing"),
        (changed(recharge, "EXPIRED_CARD", "no_card"), "pauses nothing"),
        (changed(recharge, "PAUSE_AFTER_DECLINES", 2), "pauses recharges"),
        (changed(recharge, "paid_by_hand", lambda _: None), "was told paused"),
        (changed(recharge, "new_method", lambda _: None), "was told paused"),
        (lambda: considering(Stage.PAUSED), "while recharges are paused"),
        (lambda: considering(Stage.COOLING), "in the back-off"),
        (changed(recharge, "BACKOFF", timedelta(minutes=1)), "is followed by another try"),
        (lambda: after_declines(retry=False, stage=Stage.IDLE, until=None), "begins an epoch"),
        (lambda: after_declines(method_index=0), "is next"),
        (changed(recharge, "_worn_out", lambda *_: False), "was told attempts_exhausted"),
        (lambda: without(Withheld.ATTEMPTS_EXHAUSTED), "was declined too often"),
        (lambda: guarded(Withheld.PAUSED), "was told paused"),
        (lambda: guarded(Withheld.COOLING), "was told cooling"),
        (lambda: guarded(Withheld.ATTEMPTS_EXHAUSTED), "was told attempts_exhausted"),
    ],
)
def test_what_is_taken_out_shows(
    broken: Callable[[], AbstractContextManager[Any]], seen: str
) -> None:
    with soon_worn_out(), broken():
        for seed in range(300):
            dice = random.Random(seed)
            walk = [(dice.choice(ACTIONS), dice.randrange(51)) for _ in range(60)]
            if any(seen in fault.text for fault in walked(walk).audited(END)):
                return
    pytest.fail("no walk shows it")
