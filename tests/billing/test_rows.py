"""How long a row may get: a law, whatever is in it and however large its values are."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.commands import Compare, Licences, Method, RechargePolicy
from schemas.funding import Reason, Status
from schemas.notices import Withheld
from streams.billing import commands, granting, grants, recharge, results
from streams.billing.account import (
    Account,
    account_from,
    decode_row,
    encode_row,
)
from streams.billing.booking import Draft
from streams.billing.money import MAX_BALANCE_NANOS
from streams.billing.parts import (
    AccountRow,
    Asked,
    Assignment,
    Attempt,
    Declines,
    Grant,
    LicenceCount,
    Licensed,
    LotKind,
    Planned,
    Policy,
    Recharging,
    Risk,
    Spent,
    Sum,
    UnpaidFund,
    Used,
    Watch,
    counts_from,
    flat_from,
    short,
    sums_of,
    used_from,
)
from streams.coverage import load_coverage
from tests.billing.builders import (
    NOW,
    Book,
    a_cause,
    a_command,
    a_grant,
    an_account,
    an_adjustment,
    settings,
)

LAW = 4_096
MOST = MAX_BALANCE_NANOS
LATER = NOW + timedelta(days=366, microseconds=1)
LAST = NOW + granting.EXPIRES_WITHIN
COVERAGE = load_coverage(None)
UUID = "01890a5d-ac96-774b-bcce-b302099a8057"
POOLS = 8

nanos = st.integers(-MOST, MOST) | st.sampled_from([-MOST, MOST])
paid = st.integers(0, MOST) | st.just(MOST)
instants = st.integers(-2_000 * 86_400_000_000, 36_600 * 86_400_000_000).map(
    lambda since_now: NOW + timedelta(microseconds=since_now)
)
numbers = st.integers(0, 2**40)


def texts(length: int) -> st.SearchStrategy[str]:
    letters = st.characters(min_codepoint=48, max_codepoint=122)
    return st.text(letters, min_size=length, max_size=length)


lots = st.builds(
    Grant, texts(13), st.sampled_from(LotKind), st.integers(0, 1_000), paid, paid, instants,
    instants, instants, st.integers(0, 2),
)  # fmt: skip
plans = st.builds(
    Planned, texts(13), st.sampled_from(LotKind), st.integers(0, 1_000), paid, instants, instants,
    instants, instants, st.integers(0, 366), st.just(0),
)  # fmt: skip
spent = st.builds(Spent, lots.map(lambda one: replace(one, left_nanos=0, warnings=0)),
                  st.integers(20_000, 60_000), st.booleans())  # fmt: skip


@st.composite
def all_lots(draw: st.DrawFn) -> dict[str, Any]:
    """As many lots as a row may have, of all sorts."""
    planned = draw(st.integers(0, granting.MOST_PLANNED))
    left = grants.MOST_LOTS - planned
    lapsed = draw(st.integers(0, left))
    active = draw(st.integers(0, left - lapsed))
    sizes = {"planned": planned, "lapsed": lapsed, "grants": active}
    sizes["spent"] = left - lapsed - active
    kinds: dict[str, Any] = {"planned": plans, "lapsed": lots, "grants": lots, "spent": spent}
    return {
        name: tuple(draw(st.lists(kinds[name], min_size=size, max_size=size)))
        for name, size in sizes.items()
    }


def a_plan(number: int, changes: int, minutes: int, since: datetime) -> Licensed:
    return Licensed(
        f"{number:032}",
        "GB",
        counts_from(LicenceCount(since, 1_000_000) for _ in range(changes)),
        used_from(Used("p" * 20, 202601 + month, minutes, 3) for month in range(3)),
    )


def some_pools(minutes: int, since: datetime, first: int = 12) -> tuple[Licensed, ...]:
    """Eight pools with all the changes that there may be, some plans with more than others."""
    changes, left = [], commands.MOST_CHANGES_IN_ALL
    for number in range(POOLS):
        more = min(left, first - 1 if number < POOLS - 1 else left)
        changes.append(1 + more)
        left -= more
    return tuple(a_plan(number, count, minutes, since) for number, count in enumerate(changes))


def a_request(amount: int, at: datetime, method: str = "m" * 48) -> Asked:
    return Asked(
        recharge_id=UUID, amount_nanos=amount, epoch=99_999, attempt=999, method=method,
        policy_version=99_999, reason=Reason.BELOW_TRIGGER, trigger_nanos=amount,
        balance_nanos=-amount, caused_by=f"telephony/{UUID}", requested_at=at, expires_at=at,
        needs_action=True, overdue=True, unresolved=True, exposure_nanos=amount,
    )  # fmt: skip


def whole(amount: int, at: datetime, number: int) -> Account:
    """An account with every member set, but for lots, pools and histories."""
    policy = Policy(
        version=99_999, enabled=True, trigger_nanos=amount, compare=Compare.LE,
        method=Method.GAP_PLUS_AMOUNT, amount_nanos=amount, target_nanos=amount, min_nanos=amount,
        max_nanos=amount, daily_cap_nanos=amount, weekly_cap_nanos=amount,
        monthly_cap_nanos=amount, max_per_day=1_000, cooldown_s=86_400,
        velocity=tuple((f"{one:020}", amount) for one in range(3)),
    )  # fmt: skip
    recharging = Recharging(
        stage="needs_approval", epoch=99_999, attempt=999, asked=a_request(amount, at), until=at,
        retry=True, method_index=4, rounds=99, declines_in_row=4,
        withheld=Withheld.ATTEMPTS_EXHAUSTED, opens_at=at, approved=True,
    )  # fmt: skip
    watch = Watch(
        fall_nanos=-amount, rise_nanos=amount, armed=255, funding_nanos=amount, mark_at=at,
        mark_nanos=-amount, check_nanos=amount, scopes=255, version=99_999, renew_at=at,
    )  # fmt: skip
    return account_from(AccountRow(
        tenant_id="t" * 64, currency="USD", seq=number, head=bytes(32), overdraft_nanos=amount,
        opened_at=at, billing_from=at, closed_at=at, time_zone="America/Argentina/ComodRivadavia",
        settings_version=99_999, overdraft_floor_nanos=amount, policy=policy,
        payment_methods=tuple(f"{one:048}" for one in range(5)), recharging=recharging,
        watch=watch, alert_levels=(99, 98, 97, 96), exposure_nanos=amount, holds=5_000,
        holds_told=True,
    ))  # fmt: skip


def most_lots() -> dict[str, Any]:
    lot = Grant("c" * 13, LotKind.PROMOTIONAL, 1_000, MOST, MOST, LATER, LAST, LATER, 2)
    plan = Planned(
        "c" * 13, LotKind.PROMOTIONAL, 1_000, MOST, LATER, LATER, LAST, LATER, every_days=366
    )
    return {"grants": (lot,) * 16, "planned": (plan,) * granting.MOST_PLANNED}


@example(most_lots(), MOST, LAST, 2**40, 12)
@given(all_lots(), nanos, instants, numbers, st.integers(1, 12))
def test_a_row_with_24_lots_and_8_pools_stays_below_four_kilobytes(
    all_of_it: dict[str, Any], amount: int, at: datetime, number: int, first: int
) -> None:
    pools = some_pools(abs(amount), at, first)
    account = whole(amount, at, number).changed(pools=pools, **all_of_it)
    assert grants.lots_of(account) + len(account.standing.spent) == grants.MOST_LOTS
    value = encode_row(account)
    assert decode_row(value) == account
    assert len(value) <= LAW


def test_the_longest_row_of_all_has_a_length_that_is_known() -> None:
    base = whole(MOST, LATER, 2**40)
    fund = replace(
        a_request(MOST, LATER), epoch=None, attempt=None, policy_version=0, reason=Reason.FUND,
        trigger_nanos=None,
    )  # fmt: skip
    recharging = replace(
        base.standing.recharging,
        attempts=(Attempt(99_999, 999, MOST, LATER, MOST),) * recharge.KEPT_ATTEMPTS,
        hours=flat_from(Sum(500_000 + at, 99, MOST) for at in range(25)),
        days=flat_from(Sum(20_500 + at, 99, MOST) for at in range(31)),
        declines=(Declines(bytes(8), (20_500, *range(14))),) * recharge.MOST_DECLINED,
        risks=tuple(
            Risk(f"{one:020}", flat_from(Sum(120_000 + at, 0, MOST) for at in range(7)))
            for one in range(3)
        ),
    )
    recharged = base.changed(pools=some_pools(MOST, LATER), recharging=recharging, **most_lots())
    everything = recharged.changed(
        funds=(fund,) * commands.MOST_OPEN_FUNDS,
        unpaid_funds=(UnpaidFund(bytes(8), MOST),) * results.KEPT_UNPAID,
        decks=(Assignment("d" * 64, LATER),) * commands.MOST_ASSIGNMENTS,
    )
    assert len(encode_row(recharged)) <= 5_800
    assert len(encode_row(everything)) <= 8_700


# -- bounds that the law rests on -----------------------------------------------------------------


def refused(book: Book, command: Any) -> str | None:
    outcome = book.feed(a_command(command), coverage=COVERAGE)
    assert outcome.label == "refused"
    return outcome.notices[0].rule


def test_licences_of_all_plans_together_change_so_often_and_no_more() -> None:
    book = Book(an_account("1"))

    def licences(country: str, days: int) -> Licences:
        return Licences(
            tenant_id="t-1", issued_at=NOW, capability="MCOPSTN1", count=1, country=country,
            effective_from=NOW - timedelta(days=days),
        )  # fmt: skip

    for country, changes in (("US", 12), ("FR", 12), ("DE", 7), ("NL", 1)):
        for days in range(changes):
            outcome = book.feed(a_command(licences(country, days)), coverage=COVERAGE)
            assert outcome.label == "applied", outcome.notices
    assert refused(book, licences("NL", 1)) == "too_many_changes"
    assert book.feed(a_command(licences("ES", 1)), coverage=COVERAGE).label == "applied"


def test_what_policies_name_is_no_longer_than_a_row_bears() -> None:
    book = Book(an_account("1"))
    assert refused(book, settings(0, payment_methods=["€" * 17])) == "payment_methods"
    assert refused(book, settings(0, policy=RechargePolicy(velocity={"a" * 21: "1"}))) == "velocity"
    fits = settings(0, payment_methods=["€" * 16], policy=RechargePolicy(velocity={"a" * 20: "1"}))
    assert book.feed(a_command(fits)).label == "applied"


def test_a_lot_ends_within_a_hundred_years_or_never() -> None:
    book = Book(an_account("1"))
    far = NOW + timedelta(days=101 * 366)
    assert refused(book, a_grant("1", expires_at=far)) == "expires_at"
    assert refused(book, an_adjustment("1", expires_at=far)) == "expires_at"


def test_declines_of_methods_that_were_named_once_are_forgotten_before_those_of_todays() -> None:
    book = Book(an_account("0", trigger="5", methods=["stays"]))
    assert book.account is not None
    declined = book.account
    for day in range(20):
        methods = ["stays"] if not day else ["stays", f"m-{day}"]
        asked = a_request(1, NOW, methods[-1])
        recharging = replace(declined.standing.recharging, asked=asked, stage="requested")
        declined = declined.changed(recharging=recharging, payment_methods=tuple(methods))
        draft = Draft(declined, a_cause(), NOW + timedelta(days=day))
        recharge.answered(draft, Status.DECLINED, "lost_card")
        declined = draft.account
    kept = [one.method for one in declined.standing.recharging.declines]
    assert kept == [short("stays"), *(short(f"m-{day}") for day in range(13, 20))]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_of_a_methods_declines_as_many_are_kept_as_the_ceiling_counts(waits: list[int]) -> None:
    account = an_account("0", trigger="5", methods=["card"])
    day, days = 20_000, list[int]()
    for wait in waits:
        day += wait
        now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
        recharging = replace(
            account.standing.recharging, asked=a_request(1, now, "card"), stage="requested"
        )
        draft = Draft(account.changed(recharging=recharging), a_cause(), now)
        recharge.answered(draft, Status.DECLINED, "lost_card")
        account = decode_row(encode_row(draft.account))
        days = [one for one in [*days, day] if one >= day - recharge.DECLINE_DAYS]
        (kept,) = account.standing.recharging.declines
        assert kept.days == days[-recharge.DECLINES_PER_METHOD :]


def test_spend_on_classes_without_a_limit_leaves_the_row() -> None:
    account = an_account("10", trigger="5", velocity={"a": "1", "b": "1"})
    draft = Draft(account, a_cause(), NOW)
    recharge.spent(draft, "a", 1)
    policy = replace(draft.account.standing.policy, velocity=(("b", 1),))
    draft.account = draft.account.changed(policy=policy)
    recharge.spent(draft, "b", 1)
    assert [one.name for one in draft.account.standing.recharging.risks] == ["b"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), nanos), max_size=31))
def test_sums_are_read_back_as_written(steps: list[tuple[int, int, int]]) -> None:
    at, sums = 500_000, list[Sum]()
    for wait, count, amount in steps:
        at += wait
        sums.append(Sum(at, count, amount))
    assert sums_of(flat_from(sums)) == sums


def test_licences_and_uses_are_read_back_as_written() -> None:
    changes = [LicenceCount(NOW, 1), LicenceCount(LAST, 1_000_000)]
    uses = [Used("a", 202512, 1, 3), Used("a", 202601, 0), Used("b", 1, 5), Used("b", 999912, 7, 1)]
    held = Licensed("P", None, counts_from(changes), used_from(reversed(uses)))
    assert (held.changes, held.uses) == (changes, uses)
