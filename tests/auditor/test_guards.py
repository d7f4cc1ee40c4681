"""Requests that a guard forbids are noticed, and none that the product makes is blamed."""

import json
import random
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import hypothesis
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas import topics
from schemas.commands import RechargePolicy
from schemas.funding import Reason, Status
from schemas.notices import Withheld
from streams.billing import recharge
from streams.billing.events import ResultEvent
from streams.billing.outcomes import Outcome
from streams.billing.stages import Stage
from streams.testbed.auditor.guards import Came, Guards, Request, Spent
from streams.testbed.auditor.policies import Policy
from streams.testbed.auditor.prices import Deck
from streams.testbed.auditor.recharges import Fault, Moved, Recharges
from streams.testbed.auditor.records import EVER, nanos, utc
from streams.testbed.auditor.verdict import HOLDS
from tests.auditor.books import AT, NAMESPACE, RECHARGE, TENANT, record, violated
from tests.auditor.test_recharges import BEFORE, BEGUN, LATER, Asking, AskingOnce, answered_by
from tests.billing.builders import NOW, Book, a_command, a_fund, a_result, opening, settings
from tests.billing.test_stages import ACTIONS, act

RISKY = Deck(
    b"Destination Name,Country,Prefix,Price / min,Risk class\nLondon,GB,4420,0.60,premium\n"
)
CAPS = ("daily_cap", "weekly_cap", "monthly_cap")


class Risky(Asking):
    """As `Asking`, by a deck in which London is of a risk class: when the second request is made,
    51 were spent on it."""

    deck = RISKY


def and_more(books: Asking, topic: str, body: dict[str, Any]) -> None:
    """One record more of a topic that `Asking` writes."""
    log = books.log

    def with_more() -> Any:
        found = log()
        records = found.records[topic]
        records.append(record(topic, len(records), body))
        return found

    books.log = with_more  # type: ignore[method-assign]


def in_the_cooldown(books: Asking) -> None:
    books.said["cooldown_s"] = 6


def in_the_cooldown_that_is_there_unless_it_is_said(books: Asking) -> None:
    del books.said["cooldown_s"]


def more_often_than_it_may_be(books: Asking) -> None:
    books.said["max_per_day"] = 1


def above_the_daily_cap(books: Asking) -> None:
    books.said["daily_cap"] = "99.999999999"


def above_the_weekly_cap(books: Asking) -> None:
    books.said["weekly_cap"] = "99.999999999"


def above_the_monthly_cap(books: Asking) -> None:
    books.said["monthly_cap"] = "99.999999999"


def funded_by_hand_as_well(books: Asking) -> None:
    """Sixty were asked for by hand, and nobody has answered yet."""
    by_hand = {
        "recharge_id": "by-hand", "epoch": None, "attempt": None, "amount": "60",
        "amount_minor": 6_000, "reason": "fund", "caused_by": "cli/by-hand", "balance": "149.4",
        "available": "149.4", "trigger": None,
    }  # fmt: skip
    and_more(books, topics.REQUESTED, books.first | by_hand)
    fund = {"command": "fund", "command_id": "by-hand", "source": "cli",
            "amount": {"amount": "60", "currency": "USD"}}  # fmt: skip
    and_more(books, topics.COMMAND, fund)
    books.next[topics.COMMAND] = 3
    books.notices.insert(2, {"notice": "command_applied", "command_id": "by-hand", "at": AT})


def more_often_with_what_was_asked_for_by_hand(books: Asking) -> None:
    funded_by_hand_as_well(books)
    books.said["max_per_day"] = 2


def above_a_cap_with_what_was_asked_for_by_hand(books: Asking) -> None:
    funded_by_hand_as_well(books)
    books.said["daily_cap"] = "159"


def by_hand_and_for_want_of_money(books: Asking) -> None:
    funded_by_hand_as_well(books)
    log = books.log

    def otherwise() -> Any:
        found = log()
        last = json.loads(found.records[topics.REQUESTED][-1].value)
        found.records[topics.REQUESTED][-1] = record(
            topics.REQUESTED, 2, last | {"reason": "below_trigger"}
        )
        return found

    books.log = otherwise  # type: ignore[method-assign]


def a_first_attempt_that_is_called_a_retry(books: Asking) -> None:
    books.second["reason"] = "retry"


def asked_by_hand_in_an_epoch(books: Asking) -> None:
    books.second["reason"] = "fund"


def a_retry_of_what_was_paid(books: Asking) -> None:
    again = str(uuid.uuid5(NAMESPACE, f"{TENANT}/1/2"))
    books.second |= {"epoch": 1, "attempt": 2, "reason": "retry", "recharge_id": again}
    books.notices[-1]["recharge_id"] = books.public_changes["recharge_id"] = again


def paid_and_asked_for_at_once(books: Asking) -> None:
    """The first was paid in the instant of the second."""
    books.entries[2]["booked_at"] = books.notices[3]["at"] = LATER


def approved_by_nobody(books: Asking) -> None:
    books.second["reason"] = "approved"


def approved(books: Asking, at: str) -> None:
    """A person has approved what was asked for the second time."""
    books.second["reason"] = "approved"
    approve = {"command": "approve", "command_id": "yes", "source": "cli"}
    and_more(books, topics.COMMAND, approve)
    books.next[topics.COMMAND] = 3
    books.notices.append({"notice": "command_applied", "command_id": "yes", "at": at})


def approved_before_the_last_one_was_paid(books: Asking) -> None:
    approved(books, BEFORE)


def suspicious(books: Asking) -> None:
    books.said["velocity"] = {"premium": "50.999999999"}


def in_the_cooldown_of_what_was_cancelled(books: Asking) -> None:
    answered_by(books, "cancelled")
    books.notices.insert(
        3,
        {"notice": "recharge_ended", "recharge_id": RECHARGE, "at": AT, "caused_by": "pay/r1"},
    )
    in_the_cooldown(books)


BREACHES: list[tuple[type[Asking], Callable[[Any], None]]] = [
    (Asking, in_the_cooldown),
    (Asking, in_the_cooldown_that_is_there_unless_it_is_said),
    (Asking, in_the_cooldown_of_what_was_cancelled),
    (Asking, more_often_than_it_may_be),
    (Asking, above_the_daily_cap),
    (Asking, above_the_weekly_cap),
    (Asking, above_the_monthly_cap),
    (Asking, more_often_with_what_was_asked_for_by_hand),
    (Asking, above_a_cap_with_what_was_asked_for_by_hand),
    (Asking, by_hand_and_for_want_of_money),
    (Asking, a_first_attempt_that_is_called_a_retry),
    (Asking, asked_by_hand_in_an_epoch),
    (Asking, a_retry_of_what_was_paid),
    (Asking, paid_and_asked_for_at_once),
    (Asking, approved_by_nobody),
    (Asking, approved_before_the_last_one_was_paid),
    (Risky, suspicious),
]


@pytest.mark.parametrize(
    ("of", "breach"), BREACHES, ids=[breach.__name__ for _, breach in BREACHES]
)
def test_a_request_that_a_guard_forbids_is_noticed(
    of: type[Asking], breach: Callable[[Any], None]
) -> None:
    books = of()
    breach(books)
    report = books.audited()
    assert violated(report) == {"recharge"}, report.lines()
    assert report.findings["recharge"].violations == 1, report.lines()


def exactly_as_often_as_it_may_be(books: Asking) -> None:
    funded_by_hand_as_well(books)
    books.said["max_per_day"] = 3


def exactly_at_its_caps(books: Asking) -> None:
    funded_by_hand_as_well(books)
    books.said |= dict.fromkeys(CAPS, "160")


def approved_by_a_person(books: Asking) -> None:
    approved(books, LATER)


def suspicious_and_approved(books: Asking) -> None:
    suspicious(books)
    approved(books, LATER)


def exactly_at_its_limit(books: Asking) -> None:
    books.said["velocity"] = {"premium": "51", "satellite": "0"}


def suspicious_before_there_was_a_limit(books: Asking) -> None:
    suspicious(books)
    books.notices[1]["at"] = AT
    books.first["policy_version"] = None


def by_a_policy_that_nobody_knows(books: Asking) -> None:
    in_the_cooldown(books)
    more_often_than_it_may_be(books)
    books.notices[1]["caused_by"] = "cli/another"


def paid_in_the_same_instant(books: Asking) -> None:
    """Who can say whether the money was there before the request?"""
    books.said["max_per_day"] = 2
    books.entries.append(
        books.entry(6, "purchase", "60", "159", (topics.COMMAND, 2, "cli", "paid"), payment_id="p9")
        | {"booked_at": LATER}
    )
    books.public_changes |= {"available": "159"}
    paid = {"command": "book_payment", "command_id": "paid", "source": "cli", "payment_id": "p9",
            "amount": {"amount": "60", "currency": "USD"}}  # fmt: skip
    and_more(books, topics.COMMAND, paid)
    books.next[topics.COMMAND] = 3
    books.notices.append({"notice": "command_applied", "command_id": "paid", "at": LATER})


@pytest.mark.parametrize(
    ("of", "sound"),
    [
        (Asking, exactly_as_often_as_it_may_be),
        (Asking, exactly_at_its_caps),
        (Asking, approved_by_a_person),
        (Asking, paid_in_the_same_instant),
        (Risky, exactly_at_its_limit),
        (Risky, suspicious_and_approved),
        (Risky, suspicious_before_there_was_a_limit),
    ],
)
def test_a_request_that_no_guard_forbids_is_sound(
    of: type[Asking], sound: Callable[[Any], None]
) -> None:
    books = of()
    sound(books)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_a_policy_that_nobody_knows_forbids_nothing_and_is_unknown() -> None:
    books = Asking()
    by_a_policy_that_nobody_knows(books)
    report = books.audited()
    assert violated(report) == set(), report.lines()
    assert report.findings["settings"].unknown


@pytest.mark.parametrize("breach", [a_retry_of_what_was_paid, paid_and_asked_for_at_once])
def test_of_what_was_answered_in_part_nothing_is_said(breach: Callable[[Asking], None]) -> None:
    books = Asking()
    breach(books)
    assert "recharge" in violated(books.audited())
    books.starts = {topics.RESULT: 1}
    late = replace(books.records[topics.RESULT][0], offset=1, timestamp=2_000_000_000_000)
    books.records[topics.RESULT] = [late]
    books.next[topics.RESULT] = 2
    books.entries[2]["caused_by"]["offset"] = 1
    report = books.audited()
    assert "recharge" not in violated(report), report.lines()


# -- windows, and what begins a cooldown ----------------------------------------------------------

AT_HALF_PAST = datetime(2026, 3, 2, 10, 30, tzinfo=UTC)
MIDNIGHT = datetime(2026, 3, 2, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)


def found(
    guards: Guards,
    rules: dict[str, Any],
    *,
    before: list[tuple[str, datetime, datetime]] = [],  # noqa: B006
    answers: str = "declined",
    seq: int = 0,
) -> list[str]:
    """What forbids a request for 50 at half past ten, after others by id, instant and end."""
    said = {"amount": "50", "attempt": 1, "reason": "below_trigger", "policy_version": 1}
    request = Request(
        said,
        AT_HALF_PAST,
        {1: Policy(rules, EVER)},
        [{"recharge_id": one, "requested_at": at.isoformat()} for one, at, _ in before],
        [],
        {one: {answers} for one, _, _ in before},
        {one: end for one, _, end in before},
        seq,
    )
    return list(guards.judge("t-1", request, complete=True))


@pytest.mark.parametrize(
    ("rules", "since"),
    [
        ({"max_per_day": 1}, AT_HALF_PAST - timedelta(hours=24, minutes=30)),
        ({"daily_cap": "99"}, AT_HALF_PAST - timedelta(hours=24, minutes=30)),
        ({"weekly_cap": "99"}, MIDNIGHT - timedelta(days=7)),
        ({"monthly_cap": "99"}, MIDNIGHT - timedelta(days=30)),
        ({"velocity": {"premium": "49"}}, MIDNIGHT - timedelta(hours=16)),
    ],
)
def test_a_window_begins_with_the_whole_hour_day_or_block(
    rules: dict[str, Any], since: datetime
) -> None:
    for at, seen in ((since, 1), (since - MOMENT, 0)):
        guards = Guards({}, whole=True)
        guards.come("t-1", Came(at, 50 * 10**9, 1, 1))
        guards.spend("t-1", Spent(at, 50 * 10**9, "premium", 1))
        assert len(found(guards, rules)) == seen


def minutes_ago(count: int) -> datetime:
    return AT_HALF_PAST - timedelta(minutes=count)


@pytest.mark.parametrize(
    ("paid_at", "cooling"),
    [
        # The second was in flight then, and declined afterwards: nothing cools.
        (8, False),
        # Nothing was.
        (4, True),
    ],
)
def test_a_late_success_begins_a_cooldown_unless_another_is_in_flight(
    paid_at: int, cooling: bool
) -> None:
    before = [
        ("first", minutes_ago(20), minutes_ago(10)),
        ("second", minutes_ago(10), minutes_ago(5)),
    ]
    guards = Guards({}, whole=True)
    guards.cool("first", minutes_ago(paid_at))
    assert bool(found(guards, {"cooldown_s": 600}, before=before)) is cooling


def commands_are_gone(books: Asking) -> None:
    """Nobody knows the policy, nor who has approved what."""
    books.next[topics.COMMAND] = 2
    books.starts = {topics.COMMAND: 2}
    log = books.log

    def without() -> Any:
        found = log()
        found.records[topics.COMMAND] = []
        return found

    books.log = without  # type: ignore[method-assign]


def not_below_the_position(books: Asking) -> None:
    books.position_changes["now"] = AT


@pytest.mark.parametrize("gap", [commands_are_gone, not_below_the_position])
@pytest.mark.parametrize(
    "breach", [in_the_cooldown, more_often_than_it_may_be, above_the_daily_cap, approved_by_nobody]
)
def test_what_the_topics_do_not_prove_is_no_violation(
    breach: Callable[[Asking], None], gap: Callable[[Asking], None]
) -> None:
    books = Asking()
    breach(books)
    gap(books)
    report = books.audited()
    assert "recharge" not in violated(report), report.lines()


# -- audits that go on from one another -----------------------------------------------------------


def forgotten(checkpoint: dict[str, Any]) -> None:
    """As it was written before audits remembered what guards look at."""
    for known in checkpoint.values():
        for member in ("came", "spent", "cooled", "approved"):
            known["recharges"].pop(member)


@pytest.mark.parametrize("of_before", [False, True])
@pytest.mark.parametrize(
    "breach",
    [in_the_cooldown, more_often_than_it_may_be, above_the_monthly_cap, approved_by_nobody],
)
def test_what_an_earlier_audit_has_seen_is_remembered(
    breach: Callable[[Asking], None], of_before: bool
) -> None:
    once, books = AskingOnce(), Asking()
    breach(books)
    once.said = books.said
    earlier = once.checkpoint()
    if of_before:
        forgotten(earlier)
    report, later = books.audited_from(BEGUN, earlier)
    assert violated(report) == (set() if of_before else {"recharge"}), report.lines()
    # What was not known then is not known from then on, either.
    assert ("approved" in later["0"]["recharges"]) is not of_before


def test_what_came_in_the_instant_of_a_request_is_remembered_with_its_place() -> None:
    """An audit may read money of a batch whose request the next one judges."""
    guards = Guards({}, whole=True)
    guards.come("t-1", Came(AT_HALF_PAST, 50 * 10**9, 1, 7))
    guards.spend("t-1", Spent(AT_HALF_PAST, 50 * 10**9, "premium", 7))
    rules = {"max_per_day": 1, "velocity": {"premium": "1"}}
    told = json.loads(json.dumps(guards.checkpoint(AT_HALF_PAST)))
    assert found(Guards(told, whole=False), rules) == []
    assert len(found(Guards(told, whole=False), rules, seq=7)) == 2


# -- whatever happens -----------------------------------------------------------------------------
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"max_per_day": 1, "cooldown_s": 0},
    {"max_per_day": 100, "cooldown_s": 7_200, "velocity": {"premium": "40"}},
    {"max_per_day": 100, "cooldown_s": 600, "daily_cap": "150"},
    {"max_per_day": 100, "cooldown_s": 0, "weekly_cap": "200", "velocity": {"premium": "5"}},
    {"max_per_day": 100, "cooldown_s": 60, "monthly_cap": "260"},
)
END = NOW + timedelta(days=900)
MORE = ["rules", "fund", "answer fund", "wait days", "audit"]
STEPS = st.one_of(
    st.tuples(ACTIONS, st.integers(0, 50)),
    st.tuples(st.sampled_from(MORE), st.integers(0, 50)),
)


class Witnessed(Book):
    """A shard in miniature, of which everything that a topic would hold is told to audits that go
    on from one another."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Callable[[Recharges], None]] = []
        self.answers: dict[str, set[str]] = {}
        self.faults: list[Fault] = []
        self._earlier: Any = None
        self._read = self._balance = 0
        self._settled: set[tuple[str, str]] = set()

    def _apply(self, event: Any, now: datetime, terms: Any) -> Outcome:
        known = len(self.notices)
        outcome = super()._apply(event, now, terms)
        for notice in map(msgspec.to_builtins, self.notices[known:]):
            self.told.append(partial(Recharges.notice, tenant="t-1", notice=notice))
        said = getattr(event, "command", None) or getattr(event, "result", None)
        body = {} if said is None else msgspec.to_builtins(said)
        if hasattr(event, "cause"):
            cause = f"{event.cause.source}/{event.cause.id}"
            place = (event.cause.topic, 0, event.cause.offset)
            self.told.append(
                partial(
                    Recharges.record, place=place, tenant="t-1", cause=cause, body=body,
                    refused=False,
                )
            )  # fmt: skip
        applied = outcome.label == "applied"
        if body.get("command") == "approve" and applied:
            self.told.append(partial(Recharges.approve, tenant="t-1", at=now))
        if body.get("command") == "resolve_recharge" and applied:
            self.answers.setdefault(body["recharge_id"], set()).add("resolved")
        if isinstance(event, ResultEvent):
            self.answers.setdefault(body["recharge_id"], set()).add(body["status"])
        return outcome

    def audited(self, until: datetime) -> list[Fault]:
        """What this audit and those before it have found."""
        whole = self._earlier is None
        audit = Recharges(until=until, since={}, trimmed=[], whole=whole, earlier=self._earlier)
        for tell in self.told:
            tell(audit)
        self.told.clear()
        requests: dict[str, dict[str, Any]] = {}
        for one in self.requests:
            requests.setdefault(one.recharge_id, msgspec.to_builtins(one))
        moved = []
        for entry in map(json.loads, self.entries[self._read :]):
            self._balance += nanos(entry["amount"])
            cause = entry["caused_by"]
            moved.append(
                Moved(
                    entry["seq"], entry["kind"], nanos(entry["amount"]), self._balance,
                    utc(entry["booked_at"]), (cause["topic"], 0, cause["offset"]),
                    f"{cause['source']}/{cause['id']}", entry.get("payment_id"),
                    entry.get("recharge_id"),
                )
            )  # fmt: skip
        self._read = len(self.entries)
        self.faults += audit.judge(
            {"t-1": requests}, {"t-1": moved}, {}, settled=self._settled, answered=self.answers
        )
        self._settled |= {("t-1", one.payment) for one in moved if one.payment is not None}
        self._earlier = json.loads(json.dumps(audit.checkpoint()))
        return self.faults


def lived(walk: list[tuple[str, int]], rules: dict[str, Any]) -> Witnessed:
    """What became of a tenant."""
    book, now = Witnessed(), NOW
    book.feed(a_command(opening(opening_balance="120")), now)
    said: dict[str, Any] = {"enabled": True, "trigger": "100", "amount": "60"}
    book.feed(a_command(settings(0, policy=RechargePolicy(**said, **rules))), now)
    for at, (action, size) in enumerate(walk):
        account = book.account
        assert account is not None
        if action.startswith("wait"):
            hours = {"wait": 0, "wait long": 9, "wait days": 24 * (size % 12)}[action]
            now += timedelta(hours=hours, minutes=7 * size)
        match action:
            case "rules":
                policy = RechargePolicy(**said, **POLICIES[size % len(POLICIES)])
                book.feed(
                    a_command(settings(account.standing.settings_version, policy=policy)), now
                )
            case "fund":
                book.feed(a_command(a_fund(str(50 + size)), f"fund-{at}"), now)
            case "answer fund" if account.standing.funds:
                fund = account.standing.funds[size % len(account.standing.funds)]
                status = ["succeeded", "declined", "cancelled", "expired"][size % 4]
                book.feed(a_result(fund.recharge_id, Status(status), occurred_at=now), now)
            case "spend":
                act(book, action, size, at, now)
                spent = Spent(now, size * 10**9, "premium", account.seq + 1)
                book.told.append(partial(Recharges.spend, tenant="t-1", one=spent))
            case "audit":
                now += timedelta(seconds=1)
                book.audited(now)
                now += timedelta(seconds=1)
            case "answer fund":
                pass
            case _:
                act(book, "wait" if action == "wait days" else action, size, at, now)
    return book


# A success that is late comes in the instant of the request, and after it.
@example(
    [
        ("use", 28), ("resolve", 2), ("policy", 22), ("wait long", 4), ("use", 33), ("use", 31),
        ("late answer", 0),
    ],
    POLICIES[1],
)  # fmt: skip
# So does one of what was declined first.
@example(
    [
        ("method", 38), ("use", 43), ("wait", 10), ("answer", 46), ("late answer", 19),
        ("answer", 37), ("answer", 0),
    ],
    POLICIES[5],
)  # fmt: skip
@given(st.lists(STEPS, min_size=4, max_size=40), st.sampled_from(POLICIES))
@hypothesis.settings(max_examples=300)
def test_whatever_the_product_asks_for_no_guard_forbids(
    walk: list[tuple[str, int]], rules: dict[str, Any]
) -> None:
    assert lived(walk, rules).audited(END) == []


def test_more_of_a_payment_is_not_once_more() -> None:
    book = lived([("use", 21)], {"max_per_day": 2, "cooldown_s": 0})
    (asked,) = book.requests
    for amount in ("30", "60"):
        book.feed(a_result(asked.recharge_id, amount=amount), NOW)
    act(book, "use", 50, 9, NOW)
    act(book, "use", 50, 9, NOW)
    assert len(book.requests) == 2
    assert book.audited(END) == []


def runs_short(book: Witnessed, now: datetime) -> str:
    """Calls until something is asked for; its id."""
    known = len(book.requests)
    while len(book.requests) == known:
        act(book, "use", 50, 0, now)
    return book.requests[-1].recharge_id


def test_more_of_a_payment_of_an_attempt_of_long_ago_begins_no_cooldown() -> None:
    book, now = lived([], {"max_per_day": 1_000, "cooldown_s": 60}), NOW
    first = runs_short(book, now)
    book.feed(a_result(first, amount="30"), now)
    for _ in range(15):
        now += timedelta(minutes=2)
        book.feed(a_result(runs_short(book, now), amount="60", occurred_at=now), now)
    now += timedelta(minutes=2)
    book.feed(a_result(first, amount="31", occurred_at=now), now)
    runs_short(book, now + timedelta(seconds=1))
    assert book.audited(END) == []


def without(guard: Withheld) -> AbstractContextManager[Any]:
    """The product, not asking a guard."""
    others = tuple(one for one in recharge.GUARDS if one[0] is not guard)
    return patch.object(recharge, "GUARDS", others)


def never_cooling() -> AbstractContextManager[Any]:
    """The product, free to ask as soon as it is answered."""
    cool = recharge._cool

    def warm(draft: Any, *, succeeded: bool) -> None:
        cool(draft, succeeded=succeeded)
        recharge._move(draft, stage=Stage.IDLE, until=None)

    return patch.object(recharge, "_cool", warm)


def forgetful() -> AbstractContextManager[Any]:
    """The product, with no memory of what came."""
    return patch.object(recharge, "count_money", lambda *_, **__: None)


def always(reason: Reason) -> AbstractContextManager[Any]:
    """The product, giving one reason for all requests."""
    return patch.object(recharge, "_reason", lambda _: reason)


@pytest.mark.parametrize(
    ("broken", "rules", "seen"),
    [
        (never_cooling, POLICIES[2], "in the cooldown"),
        (lambda: without(Withheld.DAILY_COUNT), POLICIES[1], "are allowed"),
        (lambda: without(Withheld.DAILY_AMOUNT), POLICIES[3], "the daily_cap is"),
        (lambda: without(Withheld.WEEKLY_AMOUNT), POLICIES[4], "the weekly_cap is"),
        (lambda: without(Withheld.MONTHLY_AMOUNT), POLICIES[5], "the monthly_cap is"),
        (lambda: without(Withheld.VELOCITY), POLICIES[2], "not approved"),
        (forgetful, POLICIES[1], "are allowed"),
        (lambda: always(Reason.APPROVED), POLICIES[0], "nobody has"),
        (lambda: always(Reason.BELOW_TRIGGER), POLICIES[0], "is attempt 2"),
        (lambda: always(Reason.RETRY), POLICIES[0], "is attempt 1"),
    ],
)
def test_a_guard_that_is_not_asked_shows(
    broken: Callable[[], AbstractContextManager[Any]], rules: dict[str, Any], seen: str
) -> None:
    steps = ("use", "use", "spend", "answer", "answer", "wait", "wait long", "pay")
    with broken():
        for seed in range(200):
            dice = random.Random(seed)
            walk = [(dice.choice(steps), dice.randrange(51)) for _ in range(40)]
            if any(seen in fault.text for fault in lived(walk, rules).audited(END)):
                return
    pytest.fail("no walk shows it")
