"""Explanations tell what the outcome said, in the order in which it was decided."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from schemas.commands import Approve
from schemas.funding import Status
from schemas.notices import Notice, NoticeKind, Withheld
from streams.billing import explain, recharge
from streams.billing.booking import Draft
from streams.billing.outcomes import Outcome
from streams.billing.parts import Declines, short
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_fund,
    a_payment,
    a_result,
    an_account,
    an_adjustment,
    apply,
    closing,
    decoded,
    minutes,
    usd,
    with_policy,
)


def published(notice: Notice) -> dict[str, Any]:
    """A notice as a reader of the topic has it."""
    members: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(notice))
    return members


def the(outcome: Outcome | Book, kind: NoticeKind) -> dict[str, Any]:
    return published([one for one in outcome.notices if one.notice is kind][-1])


def asked(notice: dict[str, Any]) -> list[str]:
    return [one["guard"] for one in notice["guards"]]


def test_a_charge_names_event_deck_prefix_increments_and_the_lots_it_burnt() -> None:
    book = Book(an_account("1"))
    book.feed(a_command(an_adjustment("1", expires_at=NOW.replace(month=4))))
    cause = a_cause(name="leg-7")
    book.feed(a_call(duration_s=122, cause=cause))
    told = explain.entry(decoded(book.entries[-1]))
    assert (told.topic, told.partition, told.offset) == (cause.topic, 0, cause.offset)
    assert told.caused_by == "test/leg-7"
    assert told.why == "180 s at 1 a minute and a fee of 0 come to 3 USD"
    assert told.considered[:2] == [
        "deck default, version file-test: the row of prefix 4420",
        "increments 60/60: 122 s are billed as 180 s",
    ]
    assert told.considered[-4:] == [
        "lot g2 gave 1, 0 left in it",
        "lot g1 gave 1, 0 left in it",
        "no lot could pay the rest: overdrawn by 1",
        "balance after it: -1 USD",
    ]


def test_what_a_newer_version_adds_to_an_entry_is_told_by_its_name() -> None:
    book = Book(an_account("10"))
    book.feed(a_call())
    entry = decoded(book.entries[-1])
    entry["pool_minutes"] = 2
    entry["rate"]["steps"] = 3
    told = explain.entry(entry)
    assert "pool_minutes: 2" in told.considered
    assert "rate steps: 3" in told.considered


def a_purchase() -> dict[str, Any]:
    book = Book(an_account("0"))
    book.feed(a_command(a_payment("50")))
    return decoded(book.entries[-1])


def test_a_purchase_names_its_payment_and_reason() -> None:
    told = explain.entry(a_purchase())
    assert told.why == "purchase of 50 USD"
    assert "payment_id: wire-1" in told.considered
    assert "lot g1 got 50, 50 left in it" in told.considered


LINE = {"pool": "conference/MCOMEETADV", "month": "2026-03", "minutes": -3, "used": 6}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "expiry", "amount": "-5"}, "a lot has expired, and 5 USD were left in it"),
        ({"kind": "void", "amount": "-5"}, "a lot was voided, and 5 USD were left in it"),
        (
            {"kind": "expiry_reopened", "amount": "0.5"},
            "usage of before a lot's expiry came late: 0.5 USD of the lot come back for it",
        ),
        ({"kind": "reversal", "amount": "0.6"}, "a correction gives back 0.6 USD"),
        (
            {"kind": "reversal", "amount": "0.6", "pools": [LINE]},
            "a correction gives back 0.6 USD and 3 included minutes",
        ),
        (
            {"kind": "reversal", "amount": "0", "pools": [LINE | {"minutes": -1}]},
            "a correction gives back 1 included minute",
        ),
        ({"kind": "grant", "amount": "5"}, "grant of 5 USD"),
    ],
)
def test_what_no_rate_priced_says_why_it_moved(changes: dict[str, Any], why: str) -> None:
    assert explain.entry(a_purchase() | changes).why == why


def test_what_one_record_brought_about_is_told_together() -> None:
    paid = a_purchase() | {"seq": 8, "kind": "charge"}
    reopened = paid | {"seq": 7, "kind": "expiry_reopened"}
    other = paid | {"seq": 9, "caused_by": paid["caused_by"] | {"id": "another"}}
    told = explain.entry(reopened, [reopened, paid, other]).considered
    assert "together with entry 8: charge" in told
    assert not any("entry 9" in line for line in told)


def test_every_guard_has_a_sentence_for_passing_and_for_holding() -> None:
    assert explain.SENTENCES.keys() == set(Withheld)
    assert [reason for reason, _ in recharge.GUARDS] == list(Withheld)


def test_a_request_tells_every_guard_in_the_order_they_were_asked() -> None:
    outcome = apply(an_account("100.50", trigger="100", monthly_cap="500"), a_call())
    notice = the(outcome, NoticeKind.RECHARGE_REQUESTED)
    assert asked(notice) == [guard.value for guard in Withheld]
    assert not any(one["holds"] for one in notice["guards"])
    told = explain.decision(notice)
    assert told.why == "200 asked for: every guard let it pass"
    assert "above_trigger: 99.5 is available, short of the trigger of 100" in told.considered
    assert (
        "monthly_amount: 200 in 30 days together with this one, within the cap of 500"
        in told.considered
    )
    assert "weekly_amount: no limit is set" in told.considered
    assert not any("–" in line or "None" in line for line in told.considered)


def withheld(reason: Withheld) -> Outcome:
    """An outcome that withholds a recharge for a reason."""
    account = an_account("100", trigger="100")
    match reason:
        case Withheld.DISABLED:
            return apply(an_account("150", enabled=False, trigger="100"), minutes(60))
        case Withheld.IN_FLIGHT:
            book = Book(account)
            book.feed(a_call())
            return book.feed(a_call())
        case Withheld.STALE:
            return apply(account, a_call(), stale=True)
        case Withheld.PAUSED | Withheld.COOLING:
            book = Book(account)
            book.feed(a_call())
            code = "lost_card" if reason is Withheld.PAUSED else "insufficient_funds"
            name = book.requests[0].recharge_id
            return book.feed(a_result(name, Status.DECLINED, decline_code=code))
        case Withheld.ATTEMPTS_EXHAUSTED:
            day = (NOW - datetime(1970, 1, 1, tzinfo=UTC)).days
            worn = replace(
                account.standing.recharging, declines=(Declines(short(""), (day, *[0] * 14)),)
            )
            return apply(account.changed(recharging=worn), a_call())
        case Withheld.VELOCITY:
            suspect = an_account("100", trigger="100", velocity={"premium": "20"})
            draft = Draft(suspect, a_cause(), NOW)
            recharge.spent(draft, "premium", usd("30"))
            return apply(draft.account, a_call())
        case Withheld.ABOVE_MAX:
            return apply(
                an_account("100", trigger="100", method="gap_plus_amount", amount="100000"),
                a_call(),
            )
        case _:
            spent = Book(an_account("0"))
            spent.feed(a_command(a_payment("475")))
            assert spent.account is not None
            caps: dict[Withheld, dict[str, Any]] = {
                Withheld.DAILY_COUNT: {"max_per_day": 1},
                Withheld.DAILY_AMOUNT: {"daily_cap": "500"},
                Withheld.WEEKLY_AMOUNT: {"weekly_cap": "500"},
                Withheld.MONTHLY_AMOUNT: {"monthly_cap": "500"},
            }
            account = with_policy(spent.account, amount="50", trigger="400", **caps[reason])
            return apply(account, minutes(80))


# At its target exactly nothing is missing; a call cannot bring a balance just there.
REACHABLE = [reason for reason in Withheld if reason is not Withheld.ABOVE_TRIGGER]


@pytest.mark.parametrize("reason", REACHABLE)
def test_a_withheld_recharge_tells_the_guards_that_were_asked_and_the_one_that_held(
    reason: Withheld,
) -> None:
    outcome = withheld(reason)
    assert outcome.withheld is reason
    notice = the(outcome, NoticeKind.RECHARGE_WITHHELD)
    assert asked(notice) == [
        one.value for one in list(Withheld)[: list(Withheld).index(reason) + 1]
    ]
    assert [one["holds"] for one in notice["guards"]] == [False] * (len(asked(notice)) - 1) + [True]
    told = explain.decision(notice)
    assert told.about == f"withheld: {reason}"
    assert told.why.startswith(f"{reason}: ")
    assert not any("–" in line or "None" in line for line in told.considered)


def test_a_closed_account_says_that_it_is_closed() -> None:
    outcome = apply(an_account("100", trigger="200"), a_command(closing()))
    told = explain.decision(the(outcome, NoticeKind.RECHARGE_WITHHELD))
    assert told.why == "disabled: the account is closed"


def test_an_approved_recharge_says_who_let_it_pass() -> None:
    held = withheld(Withheld.VELOCITY)
    outcome = apply(held.account, a_command(Approve(tenant_id="t-1", issued_at=NOW)))
    told = explain.decision(the(outcome, NoticeKind.RECHARGE_REQUESTED))
    assert "velocity: approved by a person" in told.considered
    assert "reason: approved" in told.considered


def test_a_recharges_story_has_its_reason_its_answers_and_its_entry() -> None:
    book = Book(an_account("100", trigger="100", methods=["card-1", "card-2"]))
    book.feed(a_call())
    first = book.requests[0].recharge_id
    book.feed(a_result(first, Status.DECLINED, payment_id="p-1", decline_code="do_not_honor"))
    book.feed(a_result(first, amount="200", payment_id="p-1"))
    notices = [published(one) for one in book.notices]
    entries = [decoded(one) for one in book.entries]
    told = explain.recharge(first, notices, entries)
    assert told is not None
    assert told.about == f"recharge {first}"
    story = "\n".join(told.considered)
    assert "above_trigger: 99 is available" in story
    assert "declined (do_not_honor)" in story
    assert "paid: 200 by payment p-1" in story
    assert "entry 3: recharge of 200 USD" in story
    assert explain.recharge("another", notices, entries) is None


def test_funding_by_hand_has_a_story_without_guards() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(a_fund("75"), "my-own-id"))
    book.feed(a_result("my-own-id", amount="75"))
    notices = [published(one) for one in book.notices]
    told = explain.recharge("my-own-id", notices, [decoded(one) for one in book.entries])
    assert told is not None
    assert told.why.startswith("funding by hand")
    assert "entry 1: purchase of 75 USD" in told.considered[-1] + told.considered[0]


def test_the_last_decision_is_the_latest_one() -> None:
    book = Book(an_account("100", trigger="100"))
    assert explain.last_decision([published(one) for one in book.notices]) is None
    book.feed(a_call())
    book.feed(a_call())
    last = explain.last_decision([published(one) for one in book.notices])
    assert last is not None
    assert last["withheld"] == "in_flight"


def test_a_guard_of_a_newer_version_is_told_by_its_name() -> None:
    assert explain.guard({"guard": "moon_phase", "holds": True}) == "moon_phase: holds"
