"""Pools: minutes that licences include, taken before any money.

A tenant has a pool for each plan it has licences of; that of a calling plan is one country's. Its
allowance is the licences in force when the call started × the plan's minutes. A month is the
calendar month of the call's start in the tenant's time zone; nothing rolls over. Minutes are whole
and go in the order in which calls arrive. A month's use stays in the row until 35 days after its
end, and so long minutes can be taken and given back.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec.structs import replace

from schemas.ledger import PoolState, PoolUsed
from schemas.notices import NoticeKind
from schemas.usage import Kind
from streams.billing import rating
from streams.billing.account import Account
from streams.billing.booking import Draft
from streams.billing.coverage_table import Coverage, Plan
from streams.billing.events import UsageEvent
from streams.billing.parts import Licensed, Used, microseconds, used_from
from streams.billing.rates import Rate
from streams.billing.windows import zone_of

# Usage comes up to 35 days late; then its month is over for good.
KEPT: Final = timedelta(days=35)
# Percentages of an allowance at which people want to know, and their bits in `told`.
PERCENTS: Final = ((80, 1), (100, 2))
_MINUTE_S: Final = 60
_NOTHING: Final = Used("", 0, 0)


def month_of(at: datetime, time_zone: str) -> int:
    """The calendar month of an instant in a time zone, such as 202603."""
    try:
        local = at.astimezone(zone_of(time_zone))
    except OverflowError:  # beyond the calendar's ends there is no local time
        local = at
    return local.year * 100 + local.month


def closes_at(month: int, time_zone: str) -> datetime:
    """The instant after which a month gives and gets no more minutes."""
    year, number = divmod(month, 100)
    if number == 12:
        year, number = year + 1, 0
    if year > 9999:
        return datetime.max.replace(tzinfo=UTC)
    end = datetime(year, number + 1, 1, tzinfo=zone_of(time_zone)).astimezone(UTC)
    return end + KEPT


def shown_month(month: int) -> str:
    """A month as entries and notices write it: 2026-03."""
    return f"{month // 100:04d}-{month % 100:02d}"


def name_of(pool: str, held: Licensed) -> str:
    """What entries and notices call a pool: `conference/MCOMEETADV`, `domestic/MCOPSTN1/US`."""
    return f"{pool}/{held.plan}" if held.country is None else f"{pool}/{held.plan}/{held.country}"


def take(
    draft: Draft, event: UsageEvent, duration_s: int, kind: Kind, rate: Rate, coverage: Coverage
) -> tuple[PoolUsed, ...]:
    """Take what pools can pay of so many seconds of a call, in the order of its kind's sources;
    whoever asks charges the rest. `rate` is the row that prices the call. Nothing when no pool
    can pay."""
    sources = coverage.pooled.get(kind)
    if sources is None:
        return ()
    account = draft.account
    month = month_of(event.started_at, account.standing.time_zone)
    if draft.now > closes_at(month, account.standing.time_zone):
        return ()
    rest_s = duration_s
    taken: tuple[PoolUsed, ...] = ()
    for pool in sources:
        if not coverage.reaches[pool].covers(rate.country, rate.type):
            continue
        for at in range(len(account.standing.pools)):
            held = draft.account.standing.pools[at]
            plan = coverage.plans.get(held.plan)
            if plan is None or not _draws_on(account, held, plan, event):
                continue
            started_at = event.started_at
            included = plan.minutes_of(pool, held.country) * licences(held, started_at)
            left = _left(held, plan, pool, month, started_at)
            minutes = rating.take_minutes(rest_s, left * _MINUTE_S, _MINUTE_S) // _MINUTE_S
            if minutes > 0:
                taken += (_move(draft, at, pool, month, minutes, included),)
                rest_s -= minutes * _MINUTE_S
            if rest_s <= 0:
                return taken
    return taken


def minutes_of(taken: Iterable[PoolUsed]) -> int:
    """How many minutes pools have given."""
    total = 0
    for one in taken:
        total += one.minutes
    return total


def give_back(draft: Draft, taken: Iterable[PoolUsed]) -> tuple[PoolUsed, ...]:
    """Give minutes that an entry took back to their own months; what the reversing entry has to
    name. A month that is over for good gets nothing back, and is not named."""
    back: tuple[PoolUsed, ...] = ()
    for one in taken:
        year, _, number = one.month.partition("-")
        month = int(year) * 100 + int(number)
        for at, held in enumerate(draft.account.standing.pools):
            for used in kept(draft.account, held, draft.now):
                if used.month == month and name_of(used.pool, held) == one.pool:
                    minutes = min(one.minutes, used.minutes)
                    if minutes > 0:
                        back += (_move(draft, at, used.pool, month, -minutes, None),)
    return back


def licences(held: Licensed, at: datetime) -> int:
    """How many licences were in force at an instant."""
    count, instant = 0, microseconds(at)
    for place in range(0, len(held.counts), 2):
        if held.counts[place] <= instant:
            count = held.counts[place + 1]
    return count


def kept(account: Account, held: Licensed, now: datetime) -> tuple[Used, ...]:
    """The use of those months that are not over for good."""
    return tuple(
        one for one in held.uses if now <= closes_at(one.month, account.standing.time_zone)
    )


def states(account: Account, now: datetime, coverage: Coverage) -> list[PoolState]:
    """All pools as they are now, for everybody to read."""
    month = month_of(now, account.standing.time_zone)
    found = []
    for held in account.standing.pools:
        plan = coverage.plans.get(held.plan)
        for pool in () if plan is None else plan.minutes:
            assert plan is not None
            included = plan.minutes_of(pool, held.country) * licences(held, now)
            used = _used(held, pool, month).minutes
            if included or used:
                left = _left(held, plan, pool, month, now)
                name = name_of(pool, held)
                found.append(PoolState(name, shown_month(month), included, used, left))
    return found


def _draws_on(account: Account, held: Licensed, plan: Plan, event: UsageEvent) -> bool:
    """Whether a call's user has a licence of that pool: the plan is the event's capability. An
    event that does not say the user's country means the only one with licences at its start."""
    if plan.shared:
        return True
    if event.capability != held.plan:
        return False
    if event.user_country is not None:
        return event.user_country == held.country
    countries = 0
    for one in account.standing.pools:
        if one.plan == held.plan and licences(one, event.started_at):
            countries += 1
    return countries == 1


def _used(held: Licensed, pool: str, month: int) -> Used:
    for one in held.uses:
        if one.month == month and one.pool == pool:
            return one
    return _NOTHING


def _left(held: Licensed, plan: Plan, pool: str, month: int, at: datetime) -> int:
    """Minutes left in a pool for a call that started at an instant."""
    count = licences(held, at)
    left = plan.minutes_of(pool, held.country) * count - _used(held, pool, month).minutes
    if held.country is not None and held.country in plan.coupled:
        for other in plan.minutes:
            included = plan.minutes_of(other, held.country) * count
            if included and _used(held, other, month).minutes >= included:
                return 0
    return max(0, left)


def _move(
    draft: Draft, at: int, pool: str, month: int, minutes: int, included: int | None
) -> PoolUsed:
    """Add to a month's use, tell what it has crossed, forget months that are over."""
    account = draft.account
    held = account.standing.pools[at]
    before = _used(held, pool, month)
    after, told = before.minutes + minutes, before.told
    name, shown = name_of(pool, held), shown_month(month)
    for percent, bit in PERCENTS:
        if included and not told & bit and after * 100 >= included * percent:
            told |= bit
            draft.notify(NoticeKind.POOL_USED, pool=name, month=shown, percent=percent)
    others = tuple(one for one in kept(account, held, draft.now) if one != before)
    used = used_from((*others, Used(pool, month, after, told)))
    pools = (
        *account.standing.pools[:at],
        replace(held, used=used),
        *account.standing.pools[at + 1 :],
    )
    draft.account = account.changed(pools=pools)
    return PoolUsed(name, shown, minutes, after, included)
