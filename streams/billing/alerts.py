"""Notices about a balance, and the signal that suspends what needs money.

A level is told once, when the balance falls to it, and again only after the balance was 5 % above
it. Everything that could change is put into one band of balances: nearly every event leaves the
balance inside it, and two comparisons say so. The band holds for one exposure: when that changes,
everything is looked at again.
"""

from collections.abc import Set
from datetime import datetime, timedelta
from typing import Final

from msgspec.structs import replace

from schemas.commands import Compare
from schemas.ledger import EntryKind
from schemas.nanos import text_from
from schemas.notices import NoticeKind
from schemas.usage import Kind
from streams.billing import grants
from streams.billing.account import Account
from streams.billing.booking import Draft
from streams.billing.parts import Watch

# Bits in `armed` of an account's alert levels, from the top down.
_LEVELS: Final = (1, 2, 64, 128)
_EVERY_LEVEL: Final = sum(_LEVELS)
_TRIGGER: Final = 4
_EXHAUSTED: Final = 8
_NEGATIVE: Final = 16
_RUNWAY: Final = 32
# A level is armed again this much above itself; zero is, this much of the last funding above it.
REARM_PERCENT: Final = 5
# At the use of the last day, or of the time since the last funding, the money ends this soon.
RUNWAY_HOURS: Final = 24
# Shorter than this, a use tells nothing about the hours to come.
RUNWAY_FROM: Final = timedelta(minutes=15)
RUNWAY_OVER: Final = timedelta(hours=24)

# A suspension ends by itself when we do not renew it: a dead worker must not silence anybody.
LEASE: Final = timedelta(minutes=10)
RENEWED_AFTER: Final = timedelta(minutes=8)
# Groups of kinds that are suspended together, as bits in `scopes`.
_TOLL_FREE: Final = 1
_PAID: Final = 2
_FREE: Final = 4
_SCOPES: Final = (_TOLL_FREE, _PAID, _FREE)
_CLOSED: Final = _TOLL_FREE | _PAID | _FREE

_FUNDING: Final = frozenset(
    {EntryKind.PURCHASE, EntryKind.RECHARGE, EntryKind.GRANT, EntryKind.ORPHAN}
)
_LOWEST: Final = -(2**63)
_HIGHEST: Final = 2**63 - 1
_HOUR_US: Final = 3_600_000_000
_MICROSECOND: Final = timedelta(microseconds=1)


def kinds_of(scope: int, free: Set[Kind]) -> list[Kind]:
    """The kinds of a group. Toll-free stops at zero, the rest at the overdraft floor; what needs
    no money (`free`) stops only with the account. Emergency calls are in no group."""
    if scope == _FREE:
        return [kind for kind in Kind if kind in free and kind is not Kind.EMERGENCY]
    toll_free = scope == _TOLL_FREE
    return [kind for kind in Kind if kind not in free and (kind is Kind.TOLL_FREE_IN) == toll_free]


def review(draft: Draft, free: Set[Kind]) -> None:
    """Tell what the balance has crossed, suspend or resume, and set the band anew. `free` are the
    kinds of usage that need no money."""
    account = draft.account
    watch = account.standing.watch
    funding_nanos = watch.funding_nanos
    funded = False
    for kind, nanos in draft.moved:
        if nanos > 0 and kind in _FUNDING:
            funding_nanos, funded = nanos, True
    watch = replace(watch, funding_nanos=funding_nanos, fall_nanos=_LOWEST, rise_nanos=_HIGHEST)
    watch = _levels(draft, watch)
    watch = _runway(draft, watch, funded=funded)
    watch = _suspension(draft, watch, free)
    if watch != account.standing.watch:
        draft.account = draft.account.changed(watch=watch)


def arm_levels(draft: Draft) -> None:
    """The alert levels are others now: those the balance has reached will be told when it falls
    below them; those it is below already are armed as ever, above them."""
    account = draft.account
    armed = account.standing.watch.armed & ~_EVERY_LEVEL
    for percent, bit in zip(account.standing.alert_levels, _LEVELS, strict=False):
        if draft.balance_nanos * 100 >= account.standing.watch.funding_nanos * percent:
            armed |= bit
    draft.account = account.changed(watch=replace(account.standing.watch, armed=armed))


def _levels_of(account: Account, funding_nanos: int) -> list[tuple[int, int, int]]:
    """Bit, greatest balance that is told, least that arms it again; from the top down."""
    levels = []
    if funding_nanos:
        for percent, bit in zip(account.standing.alert_levels, _LEVELS, strict=False):
            level_nanos = funding_nanos * percent // 100
            levels.append((bit, level_nanos - 1, _above(level_nanos)))
    policy = account.standing.policy
    if policy.enabled and account.standing.closed_at is None:
        at = policy.trigger_nanos - (policy.compare is Compare.LT)
        levels.append((_TRIGGER, at, _above(policy.trigger_nanos)))
    above_zero = max(1, funding_nanos * REARM_PERCENT // 100)
    return [*levels, (_EXHAUSTED, 0, above_zero), (_NEGATIVE, -1, above_zero)]


def _above(level_nanos: int) -> int:
    return level_nanos + level_nanos * REARM_PERCENT // 100


def _levels(draft: Draft, watch: Watch) -> Watch:
    balance_nanos = draft.balance_nanos
    armed = watch.armed & _RUNWAY
    fall_nanos, rise_nanos = watch.fall_nanos, watch.rise_nanos
    for bit, falls_at, rises_at in _levels_of(draft.account, watch.funding_nanos):
        is_armed = bool(watch.armed & bit)
        if is_armed and balance_nanos <= falls_at:
            is_armed = False
            _tell(draft, bit, watch.funding_nanos)
        elif balance_nanos >= rises_at:
            is_armed = True
        if is_armed:
            armed |= bit
            fall_nanos = max(fall_nanos, falls_at)
        else:
            rise_nanos = min(rise_nanos, rises_at)
    return replace(watch, armed=armed, fall_nanos=fall_nanos, rise_nanos=rise_nanos)


def _tell(draft: Draft, bit: int, funding_nanos: int) -> None:
    balance = text_from(draft.balance_nanos)
    if bit == _TRIGGER:
        level = text_from(draft.account.standing.policy.trigger_nanos)
        draft.notify(NoticeKind.BALANCE_BELOW_TRIGGER, balance=balance, level=level)
    elif bit == _EXHAUSTED:
        draft.notify(NoticeKind.BALANCE_EXHAUSTED, balance=balance)
    elif bit == _NEGATIVE:
        draft.notify(NoticeKind.BALANCE_NEGATIVE, balance=balance)
    else:
        percent = draft.account.standing.alert_levels[_LEVELS.index(bit)]
        level = text_from(funding_nanos * percent // 100)
        draft.notify(NoticeKind.BALANCE_LOW, balance=balance, level=level, percent=percent)


def _runway(draft: Draft, watch: Watch, *, funded: bool) -> Watch:
    """For how long the money lasts. Worked out whenever a twentieth of the last funding is gone;
    never below zero, where no use leaves the band."""
    balance_nanos = draft.balance_nanos
    armed, at, mark_nanos, check_nanos = (
        watch.armed,
        watch.mark_at,
        watch.mark_nanos,
        watch.check_nanos,
    )
    if at is None:
        armed |= _RUNWAY
    if at is None or funded or balance_nanos > mark_nanos:
        at, mark_nanos, check_nanos = draft.now, balance_nanos, balance_nanos
    step_nanos = watch.funding_nanos * REARM_PERCENT // 100
    if balance_nanos > 0 and step_nanos and check_nanos - balance_nanos >= step_nanos:
        spent_nanos, elapsed = mark_nanos - balance_nanos, draft.now - at
        if spent_nanos > 0 and elapsed >= RUNWAY_FROM:
            # In µs and not as a timedelta: a small use of much money lasts beyond any calendar.
            lasts_us = balance_nanos * (elapsed // _MICROSECOND) // spent_nanos
            if armed & _RUNWAY and lasts_us < RUNWAY_HOURS * _HOUR_US:
                armed &= ~_RUNWAY
                draft.notify(
                    NoticeKind.BALANCE_RUNWAY,
                    balance=text_from(balance_nanos),
                    hours=lasts_us // _HOUR_US,
                )
            elif lasts_us * 100 >= RUNWAY_HOURS * _HOUR_US * (100 + REARM_PERCENT):
                armed |= _RUNWAY
        if elapsed >= RUNWAY_OVER:
            at, mark_nanos = draft.now, balance_nanos
        check_nanos = balance_nanos
    fall_nanos = watch.fall_nanos
    if balance_nanos > 0 and step_nanos:
        fall_nanos = max(fall_nanos, min(check_nanos - step_nanos, balance_nanos - 1))
    return replace(
        watch,
        armed=armed,
        mark_at=at,
        mark_nanos=mark_nanos,
        check_nanos=check_nanos,
        fall_nanos=fall_nanos,
    )


def _suspension(draft: Draft, watch: Watch, free: Set[Kind]) -> Watch:
    """The signal for those who admit calls. Whatever changes, all of it is told anew, so that
    the highest version a reader has seen is all it needs."""
    account, balance_nanos = draft.account, draft.balance_nanos
    closed = account.standing.closed_at is not None
    # What open calls hold is not there for others: it lifts the end of all that needs credits.
    paid_ends = account.standing.exposure_nanos - account.standing.overdraft_floor_nanos
    ends = ((_TOLL_FREE, 0), (_PAID, paid_ends))
    held = _CLOSED if closed else 0
    fall_nanos, rise_nanos = watch.fall_nanos, watch.rise_nanos
    if not closed:
        for bit, end_nanos in ends:
            if balance_nanos <= end_nanos:
                held |= bit
                rise_nanos = min(rise_nanos, end_nanos + 1)
            else:
                fall_nanos = max(fall_nanos, end_nanos)
    changed = held != watch.scopes
    due = watch.renew_at is not None and watch.renew_at <= draft.now
    version, renew_at = watch.version, watch.renew_at
    if changed:
        version += 1
        _signal(draft, NoticeKind.RESUMED, watch.scopes & ~held, version, None, free)
    if changed or due:
        leased = held and not closed
        lease_until = draft.now + LEASE if leased else None
        renew_at = draft.now + RENEWED_AFTER if leased else None
        _signal(draft, NoticeKind.SUSPENDED, held, version, lease_until, free)
    return replace(
        watch,
        scopes=held,
        version=version,
        renew_at=renew_at,
        fall_nanos=fall_nanos,
        rise_nanos=rise_nanos,
    )


def _signal(
    draft: Draft,
    kind: NoticeKind,
    scopes: int,
    version: int,
    lease_until: datetime | None,
    free: Set[Kind],
) -> None:
    for bit in _SCOPES:
        kinds = kinds_of(bit, free) if scopes & bit else []
        if kinds:
            draft.notify(
                kind,
                balance=text_from(draft.balance_nanos),
                scopes=kinds,
                signal_version=version,
                lease_until=lease_until,
                **draft.exposed(),
            )


def warn_of_expiry(draft: Draft, at: datetime) -> None:
    """Lots that expire soon and still have money."""
    if not any(one.warn_at is not None and one.warn_at <= at for one in draft.account.grants):
        return
    kept = []
    for grant in draft.account.grants:
        if grant.warn_at is not None and grant.warn_at <= at:
            assert grant.expires_at is not None
            # Expired meanwhile, it is told as that, by the tick that follows.
            if grant.expires_at > draft.now:
                draft.notify(
                    NoticeKind.GRANT_EXPIRING,
                    grant_id=grant.id,
                    amount=text_from(grant.left_nanos),
                    expires_at=grant.expires_at,
                )
            grant = replace(grant, warnings=grants.warnings_left(grant.expires_at, draft.now))
        kept.append(grant)
    draft.account = draft.account.changed(grants=tuple(kept))
