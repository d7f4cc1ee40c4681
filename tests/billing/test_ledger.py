"""The one door: money in, money out, commands, results, and the laws that hold after anything."""

from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas.commands import Licences, Method, RechargePolicy
from schemas.funding import Status
from schemas.ledger import LedgerEntry
from schemas.money import Money
from schemas.notices import DeadLetterReason, NoticeKind, Withheld
from schemas.usage import Kind, Phase
from streams.billing import account as rows
from streams.billing import granting, grants
from streams.billing.account import NewerRowError, decode_hold, decode_row, encode_hold, encode_row
from streams.billing.booking import months_later
from streams.billing.events import Event, ResultEvent
from streams.billing.ledger import public_balance
from streams.billing.outcomes import Outcome
from streams.billing.parts import LAPSED_KEPT, VERSION
from streams.coverage import load_coverage
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_command,
    a_fund,
    a_grant,
    a_payment,
    a_result,
    a_void,
    an_account,
    an_adjustment,
    apply,
    chain_holds,
    closing,
    decoded,
    entries_of,
    minutes,
    opening,
    requested,
    settings,
    told,
    usd,
)

YEAR = timedelta(days=365)
COVERAGE = load_coverage(None)


# -- money in and out -----------------------------------------------------------------------------


def test_usage_is_booked_below_zero_and_the_next_money_pays_that_first() -> None:
    book = Book(an_account("5"))
    book.feed(minutes(8))
    assert book.account is not None
    assert (book.balance_nanos, book.account.overdraft_nanos) == (usd("-3"), usd("3"))
    book.feed(a_command(a_payment("10")))
    assert book.account.overdraft_nanos == 0
    assert book.balance_nanos == usd("7")


def test_bought_money_expires_twelve_months_later_with_an_entry_and_a_notice() -> None:
    book = Book(an_account("10"))
    book.feed(minutes(4))
    book.feed(a_call(kind="free"), NOW + YEAR)
    entry = decoded(book.entries[-1])
    assert (entry["kind"], entry["amount"], entry["at"]) == ("expiry", "-6", "2027-03-02T10:00:00Z")
    assert book.balance_nanos == 0
    assert NoticeKind.GRANT_EXPIRED in [notice.notice for notice in book.notices]


def test_what_expires_first_is_burnt_first() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(an_adjustment("10")))
    book.feed(a_command(an_adjustment("10", expires_at=NOW + timedelta(days=1))))
    book.feed(minutes(12))
    assert [grant["left"] for grant in decoded(book.entries[-1])["grants"]] == ["0", "8"]


def test_an_expired_lot_never_pays_for_later_usage() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(an_adjustment("10", expires_at=NOW + timedelta(days=1))))
    later = NOW + timedelta(days=1)
    book.feed(a_call(started_at=later), later)
    assert book.balance_nanos == usd("-1")


@pytest.mark.parametrize(
    ("at", "months", "later"),
    [
        ("2026-01-31", 1, "2026-02-28"),
        ("2024-02-29", 12, "2025-02-28"),
        ("2026-11-25", 12, "2027-11-25"),
    ],
)
def test_months_end_on_the_same_day_or_the_last(at: str, months: int, later: str) -> None:
    started = NOW.fromisoformat(at)
    assert months_later(started, months) == NOW.fromisoformat(later)


@pytest.mark.parametrize("most", ["999999999", "-999999999"])
def test_a_balance_beyond_its_range_is_refused_whole(most: str) -> None:
    account = an_account("0")
    outcome = None
    for _ in range(10):
        outcome = apply(account, a_command(an_adjustment(most)))
        assert outcome.account is not None
        account = outcome.account
    assert outcome is not None
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "overflow")
    assert account.balance_nanos == usd(most) * 9


def test_a_public_balance_says_nothing_of_debt_or_holds_that_are_not_there() -> None:
    owing = apply(an_account("1"), minutes(3)).account
    assert owing is not None
    for account, debt in ((an_account("1"), None), (owing, "2")):
        public = decoded(msgspec.json.encode(public_balance(account, NOW, COVERAGE)))
        assert (public.get("overdraft"), "exposure" in public) == (debt, False)


# -- results --------------------------------------------------------------------------------------


def credited(amount: str = "200") -> tuple[Book, str]:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    book.feed(a_result(request.recharge_id, amount=amount))
    return book, request.recharge_id


def test_a_success_repeated_credits_once() -> None:
    book, recharge_id = credited()
    for _ in range(3):
        assert book.feed(a_result(recharge_id, amount="200")).entries == ()
    assert book.balance_nanos == usd("299")


def test_amounts_are_cumulative_per_payment() -> None:
    book, recharge_id = credited("50")
    book.feed(a_result(recharge_id, amount="200"))
    book.feed(a_result(recharge_id, amount="120"))
    assert book.balance_nanos == usd("299")


def test_money_nobody_asked_for_is_an_orphan_credited_and_flagged() -> None:
    book = Book(an_account("1"))
    outcome = book.feed(a_result("who-knows", amount="30"))
    assert (book.balance_nanos, told(outcome)) == (usd("31"), ["orphan_payment"])
    assert decoded(outcome.entries[0])["kind"] == "orphan"


def test_a_result_in_another_currency_is_refused() -> None:
    account, request = requested(an_account("100", trigger="100"))
    event = a_result(request.recharge_id, amount="5")
    foreign = msgspec.structs.replace(event.result, amount=Money(amount="5", currency="EUR"))
    refused = apply(account, ResultEvent(foreign, event.cause, event.payment)).refused
    assert refused is not None
    assert refused.reason is DeadLetterReason.CURRENCY_MISMATCH


@pytest.mark.parametrize("amount", ["-5", "0"])
def test_a_success_of_nothing_is_refused(amount: str) -> None:
    account, request = requested(an_account("100", trigger="100"))
    refused = apply(account, a_result(request.recharge_id, amount=amount)).refused
    assert refused is not None
    assert (refused.reason, refused.path) == (DeadLetterReason.SCHEMA_VIOLATION, "$.amount.amount")


def test_refunds_add_up() -> None:
    book, recharge_id = credited()
    for amount in ("20", "20", "50"):
        book.feed(a_result(recharge_id, Status.REFUNDED, amount=amount))
    assert book.balance_nanos == usd("249")


@given(
    st.permutations(
        [
            (Status.SUCCEEDED, "200"),
            (Status.DECLINED, None),
            (Status.REFUNDED, "30"),
            (Status.DISPUTE_OPENED, "100"),
            (Status.DISPUTE_WON, "100"),
        ]
    ),
    st.lists(st.integers(0, 4), max_size=6),
)
def test_answers_in_any_order_any_number_of_times_end_in_the_same_money(
    answers: list[tuple[Status, str | None]], repeats: list[int]
) -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    for status, amount in [*answers, *(answers[at] for at in repeats)]:
        book.feed(a_result(request.recharge_id, status, amount=amount))
    assert book.balance_nanos == usd("269")


@given(
    st.permutations(
        [(Status.SUCCEEDED, "200"), (Status.DISPUTE_OPENED, "200"), (Status.DISPUTE_LOST, "200")]
    )
)
def test_a_lost_dispute_ends_in_one_debit(answers: list[tuple[Status, str]]) -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    for status, amount in answers:
        book.feed(a_result(request.recharge_id, status, amount=amount))
    assert book.balance_nanos == usd("99")


@given(
    st.permutations(
        [
            (Status.SUCCEEDED, "200"),
            (Status.DISPUTE_OPENED, "200"),
            (Status.DISPUTE_WON, "120"),
            (Status.DISPUTE_LOST, "80"),
        ]
    )
)
def test_a_dispute_that_is_partly_won_and_partly_lost_costs_what_was_lost(
    answers: list[tuple[Status, str]],
) -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    for status, amount in answers:
        book.feed(a_result(request.recharge_id, status, amount=amount))
    assert book.balance_nanos == usd("219")


# -- commands -------------------------------------------------------------------------------------


def refusal(outcome: Outcome) -> str | None:
    assert outcome.label == "refused", outcome
    assert [notice.notice for notice in outcome.notices] == [NoticeKind.COMMAND_REFUSED]
    assert outcome.notices[0].fix
    assert outcome.entries == ()
    return outcome.notices[0].rule


def policy(**members: object) -> RechargePolicy:
    return RechargePolicy(**{"enabled": True, "trigger": "100", "amount": "200"} | members)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        (opening(), "already_open"),
        (settings(7), "version_conflict"),
        (settings(0, policy=policy(trigger="4.99")), "trigger_minimum"),
        (settings(0, policy=policy(amount="49.99")), "amount_minimum"),
        (settings(0, policy=policy(method=Method.TARGET, target="99")), "target_below_trigger"),
        (settings(0, policy=policy(min_amount="60", max_amount="55")), "min_above_max"),
        (settings(0, policy=policy(monthly_cap="-1")), "monthly_cap"),
        (settings(0, overdraft_floor="-1"), "overdraft_floor"),
        (a_fund("49"), "amount_minimum"),
        (a_fund("50", "EUR"), "currency_mismatch"),
        (a_payment("-1"), "amount_positive"),
        (a_payment("1000000000"), "amount_maximum"),
        (an_adjustment("0"), "amount_zero"),
        (an_adjustment("5", currency="EUR"), "currency_mismatch"),
        (an_adjustment("5", expires_at=NOW), "expires_at"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_with_rule_and_fix(
    command: object, rule: str
) -> None:
    account = an_account("10")
    outcome = apply(account, a_command(command))  # type: ignore[arg-type]
    assert refusal(outcome) == rule
    assert outcome.account == account


def test_the_minimum_is_named_in_the_accounts_currency() -> None:
    outcome = apply(an_account("10"), a_command(settings(0, policy=policy(trigger="1"))))
    assert outcome.notices[0].fix == "Trigger must be at least 5.00 USD."


@pytest.mark.parametrize(
    ("command", "rule"),
    [(a_fund("50"), "unknown_tenant"), (opening(currency="XXX"), "unknown_currency")],
)
def test_a_command_about_nobody_is_refused(command: object, rule: str) -> None:
    outcome = apply(None, a_command(command))  # type: ignore[arg-type]
    assert refusal(outcome) == rule
    assert outcome.account is None


def test_every_applied_command_has_exactly_one_answer() -> None:
    account = an_account("10")
    for command in (settings(0), a_fund("50"), a_payment("5"), an_adjustment("1"), closing()):
        outcome = apply(account, a_command(command))
        answers = [name for name in told(outcome) if name.startswith("command_")]
        assert answers == ["command_applied"]


def test_a_payment_received_elsewhere_is_booked_once() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(a_payment("30")))
    assert refusal(book.feed(a_command(a_payment("30")))) == "already_booked"
    assert book.balance_nanos == usd("30")


def test_a_closed_account_can_be_opened_again_and_its_numbers_go_on() -> None:
    book = Book(an_account("10"))
    book.feed(a_command(closing()))
    assert refusal(book.feed(a_command(a_fund("50")))) == "closed"
    assert book.feed(a_command(opening(currency="USD"))).label == "applied"
    book.feed(minutes(1), NOW)
    assert decoded(book.entries[-1])["seq"] == 2


def test_a_closed_account_keeps_its_currency() -> None:
    book = Book(an_account("10"))
    book.feed(a_command(closing()))
    assert refusal(book.feed(a_command(opening(currency="EUR")))) == "currency_fixed"


# -- rows -----------------------------------------------------------------------------------------


def test_a_row_is_read_back_as_written_and_tells_when_it_is_due() -> None:
    account, request = requested(an_account("100", trigger="100", methods=["card-1"]))
    value = encode_row(account)
    assert decode_row(value) == account
    due_us = int.from_bytes(value[:8], "big")
    assert due_us == (request.expires_at - rows._EPOCH) // timedelta(microseconds=1)


def test_a_row_of_a_newer_version_is_refused() -> None:
    newer = an_account("1").changed(version=VERSION + 1)
    with pytest.raises(NewerRowError, match="upgrade it first"):
        decode_row(encode_row(newer))
    shaped_otherwise = rows.NEVER + msgspec.msgpack.encode([VERSION + 1, {"all": "new"}])
    with pytest.raises(NewerRowError):
        decode_row(shaped_otherwise)


@pytest.mark.parametrize("written", [[], {}, "x", ["1"], [None], [1], 7])
def test_what_is_no_row_at_all_is_told_as_such(written: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_row(rows.NEVER + msgspec.msgpack.encode(written))


def test_entries_are_what_the_wire_promises() -> None:
    book = Book(an_account("10"))
    book.feed(minutes(1))
    for value in book.entries:
        entry = msgspec.json.decode(value, type=LedgerEntry)
        assert msgspec.json.encode(entry) == value


# -- laws -----------------------------------------------------------------------------------------

AMOUNTS = st.integers(1, 400)
HOURS = st.integers(0, 72)
STATUSES = st.sampled_from(list(Status))
PHASES = st.sampled_from([Phase.START, Phase.PROGRESS, Phase.END])
STEPS = st.one_of(
    st.tuples(st.just("call"), st.integers(0, 200)),
    st.tuples(st.just("late"), st.integers(1, 200)),
    st.tuples(st.just("overnight"), st.tuples(st.integers(1, 200), st.integers(1, 60))),
    st.tuples(st.just("correct"), st.tuples(st.integers(0, 5), st.integers(0, 200))),
    st.tuples(st.just("pay"), AMOUNTS),
    st.tuples(st.just("adjust"), st.integers(-300, 300)),
    st.tuples(st.just("short"), AMOUNTS),
    st.tuples(
        st.just("grant"),
        st.tuples(AMOUNTS, st.integers(0, 3), HOURS, HOURS, st.booleans()),
    ),
    st.tuples(st.just("void"), st.integers(0, 40)),
    st.tuples(st.just("answer"), st.tuples(STATUSES, AMOUNTS, st.integers(0, 3))),
    st.tuples(st.just("fund"), st.integers(50, 90)),
    st.tuples(st.just("wait"), st.integers(1, 100_000)),
    st.tuples(st.just("close"), st.none()),
    st.tuples(st.just("open"), st.none()),
    st.tuples(st.just("settings"), st.integers(5, 300)),
    st.tuples(st.just("licences"), st.integers(0, 4)),
    st.tuples(st.just("included"), st.integers(1, 12_000)),
    st.tuples(st.just("month"), st.integers(20, 40)),
    st.tuples(st.just("leg"), st.tuples(PHASES, st.integers(0, 2), st.integers(0, 7))),
)


def play(steps: list[tuple[str, object]]) -> Book:
    """Feed a story to the books; the laws are checked by `apply` after every event."""
    book = Book(None)
    now = NOW
    book.feed(a_command(opening(opening_balance="120")), now)
    for number, (what, value) in enumerate(steps):
        event = _event(book, number, what, value, now)
        if what == "wait":
            now += timedelta(seconds=int(str(value)))
        if what == "month":
            now += timedelta(days=int(str(value)))
        book.feed(event, now, coverage=COVERAGE)
        check_laws(book)
    return book


def _event(book: Book, number: int, what: str, value: Any, now: datetime) -> Event:
    name = f"step-{number}"
    at = {"started_at": now}
    match what, value:
        case "call", int(count):
            return a_call(duration_s=60 * count, **at)
        case "late", int(count):
            return a_call(duration_s=60 * count, started_at=NOW - timedelta(days=3))
        case "overnight", (int(count), int(hours)):
            ended_at = now - timedelta(hours=hours)
            return a_call(duration_s=60 * count, started_at=ended_at - timedelta(minutes=count))
        case "grant", (int(amount), int(priority), int(begins), int(lasts), bool(again)):
            effective_at = now + timedelta(hours=begins)
            gift = a_grant(
                str(amount),
                priority=priority,
                effective_at=effective_at if begins else None,
                expires_at=effective_at + timedelta(hours=lasts) if lasts else None,
                every_days=1 if again else None,
            )
            return a_command(gift, name)
        case "void", int(back):
            account = book.account
            assert account is not None
            known = [one.id for one in (*account.grants, *account.standing.lapsed)]
            known += [one.id for one in account.standing.planned]
            return a_command(a_void(known[back % len(known)] if known else "g1"), name)
        case "correct", (back, count):
            return _correction(book, back, count, now)
        case "leg", (phase, leg, half_minutes):
            # Up to two minutes ahead of the clock, up to four behind it, in any order.
            lasted_s = 30 * half_minutes
            began = now - timedelta(seconds=240 if half_minutes > 3 else 0)
            members = {"phase": phase, "leg_id": f"leg-{leg}", "duration_s": lasted_s}
            return a_call(started_at=began, **members)
        case "pay", int(amount):
            return a_command(a_payment(str(amount), f"wire-{amount % 7}"), name)
        case "adjust", int(amount):
            return a_command(an_adjustment(str(amount)), name)
        case "short", int(amount):
            expires_at = now + timedelta(hours=2)
            return a_command(an_adjustment(str(amount), expires_at=expires_at), name)
        case "answer", (status, amount, back):
            asked = book.requests[-1 - back].recharge_id if len(book.requests) > back else "?"
            return a_result(asked, status, amount=str(amount))
        case "fund", int(amount):
            return a_command(a_fund(str(amount)), name)
        case "close", _:
            return a_command(closing(), name)
        case "open", _:
            return a_command(opening(), name)
        case "licences", int(count):
            command = Licences(
                tenant_id="t-1", issued_at=NOW, capability="MCOPSTN6", country="GB", count=count
            )
            return a_command(command, name)
        case "included", int(seconds):
            return a_call(
                kind=Kind.OVERAGE_DOMESTIC,
                capability="MCOPSTN6",
                duration_s=seconds,
                started_at=now - timedelta(days=seconds % 32),
            )
        case "settings", int(trigger):
            assert book.account is not None
            version = book.account.standing.settings_version
            return a_command(settings(version, policy=policy(trigger=str(trigger))), name)
        case _:
            return a_call(kind="free", **at)


def _correction(book: Book, back: int, count: int, now: datetime) -> Event:
    """Another length for one of the last calls that still stand; of nothing when there is none."""
    entries = [decoded(one) for one in book.entries]
    undone = {one["links"]["entry"] for one in entries if one["kind"] == "reversal"}
    standing = [
        one for one in entries if one["kind"] in ("charge", "pool") and one["seq"] not in undone
    ]
    if not standing:
        return a_call(phase="correction", corrects="nobody")
    name = standing[-1 - back % len(standing)]["caused_by"]["id"]
    event = a_call(phase="correction", corrects=name, duration_s=60 * count, started_at=now)
    return event.correcting(entries_of(book.entries, name))


def check_laws(book: Book) -> None:
    account = book.account
    assert account is not None
    assert account.balance_nanos == book.moved, "money is conserved"
    assert all(0 < grant.left_nanos <= grant.amount_nanos for grant in account.grants), (
        "no lot at or below zero, or above what was put in"
    )
    assert list(account.grants) == sorted(account.grants, key=grants.burn_order)
    if account.overdraft_nanos:
        assert not account.grants, "overdrawn beside a lot that could pay"
    assert grants.lots_of(account) <= grants.MOST_LOTS
    assert len(account.standing.planned) <= granting.MOST_PLANNED
    assert all(lapsed.left_nanos > 0 for lapsed in account.standing.lapsed)
    assert account.seq == len(book.entries)
    for held in account.standing.pools:
        most = max(one.count for one in held.changes) * 240
        assert all(0 <= one.minutes <= most for one in held.uses), "more than was included"
        assert len(held.uses) <= 3, "a month that is over for good"
    row = encode_row(account)
    assert decode_row(row) == account
    assert row[8:] == msgspec.msgpack.encode(account.members()), "as if it were written anew"
    recharging = account.standing.recharging
    assert (recharging.asked is not None) == (recharging.stage == "requested")
    if recharging.withheld is Withheld.IN_FLIGHT:
        assert recharging.asked is not None, "a quiet balance would not ask again"
        assert account.standing.policy.enabled, "a quiet balance would not tell why"
        assert account.standing.closed_at is None, "a quiet balance would not tell why"
    if recharging.stage == "idle" and recharging.withheld is None:
        assert not recharging.retry, "a quiet balance would forget a retry"
        assert not recharging.approved, "a quiet balance would forget an approval"
    alive = [hold for hold in book.holds.values() if not hold.ended]
    assert account.standing.exposure_nanos == sum(hold.nanos for hold in alive), (
        "exposure = sum of holds"
    )
    assert account.standing.holds == len(alive)
    assert all(hold.nanos > 0 for hold in alive)
    assert all(decode_hold(encode_hold(hold)) == hold for hold in book.holds.values())


def check_lots(entries: list[bytes]) -> None:
    """Fold the lots from the ledger alone: none below zero, each entry moves what it says, and one
    that has expired pays for usage of before and is empty between events."""
    left: dict[str, int] = {}
    ends: dict[str, datetime] = {}
    spent: dict[str, int] = {}
    overdraft = balance = 0
    for number, value in enumerate(entries):
        entry = msgspec.json.decode(value, type=LedgerEntry)
        for used in entry.grants:
            left[used.id] = left.get(used.id, 0) + usd(used.amount)
            assert left[used.id] == usd(used.left) >= 0
            if used.amount.startswith("-") and used.id in ends and entry.kind == "charge":
                assert min(entry.at, entry.booked_at) < ends[used.id], "paid after its expiry"
        if entry.kind == "expiry":
            spent[entry.grants[0].id] = -usd(entry.amount)
        elif entry.kind == "expiry_reopened":
            lot = entry.grants[0].id
            spent[lot] -= usd(entry.amount)
            assert spent[lot] >= 0, "more than had expired"
            assert entry.booked_at < ends[lot] + LAPSED_KEPT
        elif entry.expires_at is not None:
            ends[entry.grants[-1].id] = entry.expires_at
        overdraft = usd(entry.overdraft_after)
        balance += usd(entry.amount)
        assert sum(left.values()) - overdraft == balance, "lots and overdraft make the balance"
        last = number + 1 == len(entries)
        if last or decoded(entries[number + 1])["caused_by"] != decoded(value)["caused_by"]:
            assert not any(left[one] for one in spent), "something is left of an expired lot"


@given(st.lists(STEPS, max_size=25))
@search(max_examples=150)
def test_the_laws_hold_after_anything(steps: list[tuple[str, object]]) -> None:
    book = play(steps)
    check_lots(book.entries)
    assert chain_holds(book.entries)
    assert sum(usd(decoded(entry)["amount"]) for entry in book.entries) == book.balance_nanos
    used: dict[str, int] = {}
    for line in (line for entry in book.entries for line in decoded(entry).get("pools", ())):
        used[line["month"]] = used.get(line["month"], 0) + line["minutes"]
        assert line["minutes"] > 0
        assert used[line["month"]] == line["used"] <= line["included"]
    ids: dict[tuple[int, int], str] = {}
    for request in book.requests:
        if request.epoch is not None and request.attempt is not None:
            place = (request.epoch, request.attempt)
            assert ids.setdefault(place, request.recharge_id) == request.recharge_id


def test_an_altered_byte_breaks_the_chain() -> None:
    book = Book(an_account("10"))
    book.feed(minutes(1))
    entries = apply(None, a_command(opening(opening_balance="10"))).entries + tuple(book.entries)
    assert not chain_holds([entries[0].replace(b'"10"', b'"11"', 1)])


def test_the_same_log_gives_the_same_bytes() -> None:
    call, money = minutes(3), a_command(a_payment("9"))
    account = an_account("10")
    one, two = Book(account), Book(account)
    for event in (call, money):
        one.feed(event)
        two.feed(event)
    assert one.entries == two.entries
    assert encode_row(one.account) == encode_row(two.account)  # type: ignore[arg-type]
