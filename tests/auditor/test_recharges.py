"""What is asked for, held against need, policy and order: every breach is noticed."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas import topics
from schemas.commands import Compare, Method
from streams.billing import recharge
from streams.billing.money import CURRENCIES, exponent_of
from streams.billing.parts import Policy as Theirs
from streams.testbed.auditor.policies import MOST_TIMES, Policy, decimals, least
from streams.testbed.auditor.records import EVER, nanos, shown
from streams.testbed.auditor.verdict import HOLDS, UNKNOWN
from tests.auditor.books import (
    AT,
    NAMESPACE,
    RECHARGE,
    TENANT,
    Books,
    of_before,
    record,
    usage,
    violated,
)

POLICY: dict[str, Any] = {"enabled": True, "trigger": "100", "amount": "50", "cooldown_s": 5}
BEFORE = "2026-03-02T09:00:00Z"
LATER = "2026-03-02T10:00:05Z"
LATEST = "2026-03-02T10:00:09Z"
SECOND = str(uuid.uuid5(NAMESPACE, f"{TENANT}/2/1"))


class Asking(Books):
    """The books, with the policy by which the recharge was asked for. Beyond it the balance has
    fallen again, to 99 at `LATER`, and a second request is in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.said = dict(POLICY)
        self.entries[0]["booked_at"] = BEFORE
        for seq, name in ((4, "e8"), (5, "e9")):
            offset = seq
            long = usage(name, duration_s=2_520)
            self.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, offset, long))
            after = {4: "124.2", 5: "99"}[seq]
            charge = self.charge(seq, offset, name, "-25.2", after) | {"booked_at": LATER}
            charge["rate"]["duration_s"] = 2_520
            self.entries.append(charge)
        self.next |= {topics.CALL_USAGE: 6, topics.COMMAND: 2}
        self.asked = {
            "currency": "USD", "amount_minor": 5_000, "exponent": 2, "trigger": "100",
            "balance": "99.4", "available": "99.4", "exposure": "0", "reason": "below_trigger",
            "policy_version": 1,
        }  # fmt: skip
        self.first = self.request(1, 1, RECHARGE, **self.asked)
        self.second = self.request(
            2, 1, SECOND, **self.asked, requested_at=LATER, caused_by="pbx/e9"
        ) | {"balance": "99", "available": "99"}
        self.notices: list[dict[str, Any]] = [
            {"notice": "command_applied", "command_id": "policy", "at": BEFORE},
            {"notice": "settings_changed", "caused_by": "cli/policy", "at": BEFORE,
             "policy_version": 1},
            {"notice": "recharge_requested", "recharge_id": RECHARGE, "at": AT, "amount": "50"},
            {"notice": "recharge_succeeded", "recharge_id": RECHARGE, "at": AT,
             "caused_by": "pay/r1"},
            {"notice": "recharge_requested", "recharge_id": SECOND, "at": LATER, "amount": "50"},
        ]  # fmt: skip
        self.position_changes = {"now": LATEST}
        self.public_changes = {
            "available": "99", "policy_version": 1, "as_of": LATER,
            "recharge_state": "requested", "recharge_id": SECOND,
        }  # fmt: skip

    def log(self) -> Any:
        command = {"command": "settings", "command_id": "policy", "source": "cli",
                   "policy": self.said}  # fmt: skip
        self.records[topics.COMMAND][1:] = [record(topics.COMMAND, 1, command)]
        self.records[topics.REQUESTED] = [
            record(topics.REQUESTED, at, request)
            for at, request in enumerate((self.first, self.second))
            if request
        ]
        self.records[topics.NOTIFICATION][1:] = [
            record(topics.NOTIFICATION, at, {"tenant_id": TENANT, **notice})
            for at, notice in enumerate(self.notices, 1)
        ]
        return super().log()

    def never_asked(self) -> None:
        """Nothing was asked for the second time."""
        self.second = {}
        self.notices.pop()
        self.public_changes |= {"recharge_state": "idle", "recharge_id": None}

    def withheld(self, **changes: Any) -> None:
        """Nothing was asked for the second time, and people were told why."""
        self.never_asked()
        told = {"notice": "recharge_withheld", "at": LATER, "policy_version": 1}
        self.notices.append(told | changes)


def test_requests_by_their_policy_hold() -> None:
    report = Asking().audited()
    assert report.exit_code == HOLDS, report.lines()
    assert report.counts["requests"] == 2


def test_who_was_told_why_nothing_is_asked_needs_no_request() -> None:
    books = Asking()
    books.withheld()
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def ten_times_too_much(books: Asking) -> None:
    books.second |= {"amount": "500", "amount_minor": 50_000}
    books.notices[-1]["amount"] = "500"


def not_the_policys_trigger(books: Asking) -> None:
    books.second["trigger"] = "110"


def enough_is_there(books: Asking) -> None:
    books.second |= {"trigger": "98"}


def at_the_trigger_which_is_not_below(books: Asking) -> None:
    books.said["trigger"] = "99"
    del books.first["trigger"]
    books.second |= {"trigger": "99"}


def another_balance(books: Asking) -> None:
    books.second |= {"balance": "98", "available": "98"}


def the_balance_before_its_cause(books: Asking) -> None:
    books.second |= {"balance": "124.2", "available": "99", "exposure": "25.2"}


def a_policy_that_asks_for_nothing(books: Asking) -> None:
    books.said["enabled"] = False


def a_policy_of_later(books: Asking) -> None:
    books.notices[1]["at"] = LATEST


def less_than_anybody_may(books: Asking) -> None:
    books.said["amount"] = "49"
    for request in (books.first, books.second):
        request |= {"amount": "49", "amount_minor": 4_900}
    for at in (2, 4):
        books.notices[at]["amount"] = "49"


def other_coins(books: Asking) -> None:
    books.second["amount_minor"] = 50_000


def never_asked(books: Asking) -> None:
    books.never_asked()


def withheld_by_an_older_policy(books: Asking) -> None:
    books.withheld(policy_version=0)


def withheld_before_money_came(books: Asking) -> None:
    books.withheld(at=BEFORE)


def waits_for_what_was_never_requested(books: Asking) -> None:
    books.second = {}
    books.notices.pop()


def credited_without_a_request(books: Asking) -> None:
    books.entries[2]["recharge_id"] = "nobody-asked"
    body = books.result("r1", recharge_id="nobody-asked")
    books.records[topics.RESULT] = [record(topics.RESULT, 0, body)]
    books.withheld()
    books.first = {}
    books.notices = [one for one in books.notices if "recharge_id" not in one]


def by_no_record(books: Asking) -> None:
    books.second["caused_by"] = "pbx/e99"


def answered_afterwards(books: Asking) -> None:
    """The first was paid when the second had been asked for."""
    books.entries[2]["booked_at"] = LATEST
    for entry in books.entries[3:]:
        entry["booked_at"] = LATEST
    books.notices[3]["at"] = LATEST
    books.second["caused_by"] = "tick/" + LATER
    books.second |= {"balance": "99.4", "available": "99.4"}


def answered_only_by_what_is_not_booked(books: Asking) -> None:
    """The first was declined, but that is not booked yet."""
    answered_by(books, "declined")
    books.next[topics.RESULT] = 0


def declined_without_a_trace(books: Asking) -> None:
    answered_by(books, "declined")


def answered_by(books: Asking, status: str) -> None:
    """The first was answered, with no money and no notice."""
    del books.entries[2]
    del books.notices[3]
    body = books.result("r1", status=status, amount={"amount": "50", "currency": "USD"})
    books.records[topics.RESULT] = [record(topics.RESULT, 0, body)]
    for seq, (entry, after) in enumerate(zip(books.entries[2:], ("74.2", "49"), strict=True), 3):
        entry |= {"seq": seq, "balance_after": after}
    books.second |= {"balance": "49", "available": "49"}
    books.public_changes["available"] = "49"


def told_of_and_never_requested(books: Asking) -> None:
    books.withheld()
    books.notices.insert(
        4, {"notice": "recharge_requested", "recharge_id": SECOND, "at": LATER, "amount": "50"}
    )


def requested_without_a_word(books: Asking) -> None:
    books.notices.pop()


def told_another_amount(books: Asking) -> None:
    books.notices[-1]["amount"] = "60"


def funded_by_no_command(books: Asking) -> None:
    books.first = {}
    books.notices = [one for one in books.notices if one.get("recharge_id") != RECHARGE]
    books.entries[2] |= {"kind": "purchase"}
    fund = books.request(1, 1, RECHARGE) | {"epoch": None, "attempt": None}
    books.records[topics.REQUESTED].append(record(topics.REQUESTED, 2, fund))
    books.first = fund


BREACHES: list[tuple[Callable[[Asking], None], set[str]]] = [
    (ten_times_too_much, {"recharge"}),
    (not_the_policys_trigger, {"recharge"}),
    (enough_is_there, {"recharge"}),
    (at_the_trigger_which_is_not_below, {"recharge"}),
    (another_balance, {"recharge"}),
    (the_balance_before_its_cause, {"recharge"}),
    (a_policy_that_asks_for_nothing, {"recharge"}),
    (a_policy_of_later, {"recharge"}),
    (less_than_anybody_may, {"recharge"}),
    (other_coins, {"recharge"}),
    (never_asked, {"recharge"}),
    (withheld_by_an_older_policy, {"recharge"}),
    (withheld_before_money_came, {"recharge"}),
    (waits_for_what_was_never_requested, {"recharge"}),
    (credited_without_a_request, {"recharge"}),
    (by_no_record, {"cause"}),
    (answered_afterwards, {"one_request"}),
    (answered_only_by_what_is_not_booked, {"one_request"}),
    (declined_without_a_trace, {"one_request"}),
    (told_of_and_never_requested, {"recharge"}),
    (requested_without_a_word, {"recharge"}),
    (told_another_amount, {"recharge"}),
    (funded_by_no_command, {"recharge"}),
]


@pytest.mark.parametrize(
    ("breach", "expected"), BREACHES, ids=[breach.__name__ for breach, _ in BREACHES]
)
def test_a_breach_turns_its_invariant_red_and_no_other(
    breach: Callable[[Asking], None], expected: set[str]
) -> None:
    books = Asking()
    breach(books)
    report = books.audited()
    assert violated(report) == expected, report.lines()


def trimmed(books: Asking) -> None:
    """Commands are gone: nobody can say what the policy was."""
    ten_times_too_much(books)
    books.next[topics.COMMAND] = 3
    books.starts = {topics.COMMAND: 2}
    books.notices[0:1] = []
    log = books.log

    def without() -> Any:
        found = log()
        found.records[topics.COMMAND] = []
        found.records[topics.NOTIFICATION] = found.records[topics.NOTIFICATION][1:]
        return found

    books.log = without  # type: ignore[method-assign]


def notices_are_gone(books: Asking) -> None:
    requested_without_a_word(books)
    books.starts = {topics.NOTIFICATION: 9}
    log = books.log

    def later() -> Any:
        found = log()
        told = found.records[topics.NOTIFICATION]
        found.records[topics.NOTIFICATION] = [
            replace(one, timestamp=2_000_000_000_000) for one in told
        ]
        return found

    books.log = later  # type: ignore[method-assign]


def requests_are_gone(books: Asking) -> None:
    told_of_and_never_requested(books)
    books.first = {}
    books.starts = {topics.REQUESTED: 2}


def a_success_of_money_that_was_booked_before(books: Asking) -> None:
    answered_by(books, "succeeded")


def the_same_once_more(books: Asking) -> None:
    again = books.second | {"expires_at": LATEST}
    log = books.log

    def more() -> Any:
        found = log()
        found.records[topics.REQUESTED].append(record(topics.REQUESTED, 2, again))
        return found

    books.log = more  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "gap",
    [
        trimmed, notices_are_gone, requests_are_gone,
        a_success_of_money_that_was_booked_before, the_same_once_more,
    ],
)  # fmt: skip
def test_what_the_topics_do_not_prove_is_no_violation(gap: Callable[[Asking], None]) -> None:
    books = Asking()
    gap(books)
    found = violated(books.audited())
    # A success that moved nothing is another law's affair.
    assert found <= {"credit_once"}, books.audited().lines()


def test_a_recharge_whose_request_may_be_gone_is_unknown() -> None:
    books = Asking()
    credited_without_a_request(books)
    books.starts = {topics.REQUESTED: 2}
    report = books.audited()
    assert report.exit_code == UNKNOWN
    assert report.findings["recharge"].unknown


BEGUN = {topics.LEDGER: 3, topics.REQUESTED: 1, topics.RESULT: 1, topics.COMMAND: 2,
         topics.CALL_USAGE: 4, topics.NOTIFICATION: 5, topics.BALANCE: 0}  # fmt: skip


class AskingOnce(Asking):
    """Only the first half."""

    def __init__(self) -> None:
        super().__init__()
        del self.entries[3:]
        self.never_asked()
        del self.records[topics.CALL_USAGE][4:]
        self.next[topics.CALL_USAGE] = 4
        self.position_changes = {"now": AT}
        self.public_changes = {"available": "149.4", "policy_version": 1, "as_of": AT}


@pytest.mark.parametrize(
    ("breach", "expected"),
    [
        (None, set()),
        (ten_times_too_much, {"recharge"}),
        (another_balance, set()),
        (never_asked, {"recharge"}),
        (requested_without_a_word, {"recharge"}),
    ],
)
def test_a_checkpoint_knows_policies_and_what_was_told(
    breach: Callable[[Asking], None] | None, expected: set[str]
) -> None:
    books = Asking()
    if breach is not None:
        breach(books)
    books.entries[3]["booked_at"] = LATER
    report, _ = books.audited_from(BEGUN, AskingOnce().checkpoint())
    assert violated(report) == expected, report.lines()


def test_a_checkpoint_of_before_these_laws_proves_nothing() -> None:
    earlier = AskingOnce().checkpoint()
    of_before(earlier)
    books = Asking()
    requested_without_a_word(books)
    report, _ = books.audited_from(BEGUN, earlier)
    assert violated(report) == set(), report.lines()


amounts = st.integers(0, 10**13)


@given(
    st.sampled_from(Method), st.sampled_from(Compare), st.integers(1, 10**13), amounts, amounts,
    st.none() | amounts, st.none() | amounts, st.integers(-(10**13), 10**13),
    st.sampled_from(["USD", "JPY", "KWD", "CLF"]),
)  # fmt: skip
def test_own_reckoning_of_a_policy_agrees_with_what_is_asked(
    method: Method, compare: Compare, amount: int, target: int, trigger: int,
    least: int | None, most: int | None, available: int, currency: str,
) -> None:  # fmt: skip
    theirs = Theirs(
        trigger_nanos=trigger, compare=compare, method=method, amount_nanos=amount,
        target_nanos=target, min_nanos=least, max_nanos=most,
    )  # fmt: skip
    said = {
        "trigger": shown(trigger), "compare": compare.value, "method": method.value,
        "amount": shown(amount), "target": shown(target),
        "min_amount": None if least is None else shown(least),
        "max_amount": None if most is None else shown(most),
    }  # fmt: skip
    policy = Policy(said, EVER)
    wanted = recharge.wanted(theirs, available, currency)
    if method is Method.TARGET and wanted > 0:
        wanted = max(wanted, recharge.minimum_recharge_nanos(currency))
    assert policy.amount(available, currency) == wanted
    assert policy.below(available) == recharge.below_trigger(theirs, available)
    assert nanos(shown(available)) == available


def test_own_tables_agree_with_what_is_asked() -> None:
    for currency in CURRENCIES:
        assert decimals(currency) == exponent_of(currency)
        assert least(currency) == recharge.minimum_recharge_nanos(currency)
    assert recharge.ceiling_of("USD") == MOST_TIMES * least("USD")
