"""Charging: from a usage event to what it costs the tenant."""

from datetime import datetime, timedelta
from typing import Any, Final

from schemas.ledger import EntryKind, PoolUsed, RateUsed
from schemas.notices import DeadLetterReason
from schemas.usage import Kind, Phase
from streams.billing import corrections, coverage, holds, pools, rating, recharge
from streams.billing.account import Account
from streams.billing.booking import Draft, RefusedError, Told
from streams.billing.events import UsageEvent
from streams.billing.outcomes import Charge, Terms
from streams.billing.rates import Rate, Tariff

# Usage reports arrive 24 to 48 hours late; past that a charge is marked as late.
GRACE: Final = timedelta(hours=48)
# Ids are remembered this long; older usage could be a repeat that nobody remembers.
LATEST: Final = timedelta(days=35)
FUTURE: Final = timedelta(minutes=5)
# Usage that started before an account was closed may come as long as this after it.
LONGEST_CALL: Final = timedelta(days=31)
FORMER_KEPT: Final = LATEST + LONGEST_CALL

# An enum's member read from its class costs as much as a call.
_END: Final = Phase.END
_CORRECTION: Final = Phase.CORRECTION
_CHARGE: Final = EntryKind.CHARGE
_POOL: Final = EntryKind.POOL
_MINUTE_S: Final = 60


def charge(
    draft: Draft, event: UsageEvent, terms: Terms, back: corrections.Back | None = None
) -> str:
    """Book what a leg costs, or hold what it has cost so far; returns the outcome's label. `back`:
    in place of what was taken back. Raises RefusedError."""
    account = draft.account
    duration_s = event.duration_s
    is_open = event.phase is not _END and back is None
    if is_open:
        if event.phase is _CORRECTION:
            return correct(draft, event, terms)
        if event.phase is Phase.START and duration_s is None:
            duration_s = 0
    if duration_s is None or duration_s < 0:
        raise RefusedError(DeadLetterReason.SCHEMA_VIOLATION, "$.duration_s")
    if not billable(account, event.started_at):
        raise RefusedError(DeadLetterReason.NOT_BILLABLE, "$.started_at")
    if event.currency is not None and event.currency != account.currency:
        raise RefusedError(DeadLetterReason.CURRENCY_MISMATCH, "$.currency")
    kind = coverage.kind_of(event)
    if kind is None:
        raise RefusedError(DeadLetterReason.SCHEMA_VIOLATION, "$.kind")
    free = terms.coverage.free
    by_country = coverage.depends_on_country(event, kind)
    if kind in free and not by_country:
        return "open" if is_open else "free"
    if is_open:
        return _hold(draft, event, terms, duration_s + holds.AHEAD_S, kind)
    if not duration_s:
        return "free"
    tariff, digits, priced = _priced(account, event, terms, duration_s)
    rate = priced.rate
    if by_country:
        kind = coverage.towards(event, kind, rate.country)
        if kind in free:
            return "free"
    if not priced.amount_nanos:
        return "free"
    taken: tuple[PoolUsed, ...] = ()
    if account.standing.pools:
        taken = pools.take(draft, event, duration_s, kind, rate, terms.coverage)
        if taken:
            priced = _cost(tariff, rate, digits, event, duration_s, pools.minutes_of(taken))
    told: Told = (
        kind,
        event.call_id,
        coverage.masked(rate.prefix, digits),
        event.ended_at < draft.now - GRACE,
        event.disagrees,
        RateUsed(
            tariff.deck,
            tariff.version,
            coverage.shown_prefix(rate.prefix, digits),
            rate.per_minute_text,
            rate.connect_fee_text,
            rate.initial_increment_s,
            rate.increment_s,
            priced.billed_s,
            duration_s,
            # The usual row costs the same at any time.
            None if rate.special is None else event.started_at,
        ),
    )
    details: dict[str, Any] = {}
    if terms.persons is not None:
        details.update(terms.persons.members(account.tenant_id, event))
    if back is not None:
        details["links"] = back.links
    if taken:
        details["pools"] = taken
        if not priced.amount_nanos:
            draft.note(_POOL, event.ended_at, details, told)
            return "included"
    first = None if back is None else back.first
    draft.debit(_CHARGE, priced.amount_nanos, event.ended_at, details, first, told)
    if rate.risk_class:
        recharge.spent(draft, rate.risk_class, priced.amount_nanos)
    return "charged"


def correct(draft: Draft, event: UsageEvent, terms: Terms) -> str:
    """Take back what an earlier event has caused, and book what this one says in its place; of
    no length or a free kind, that is nothing. Raises RefusedError."""
    back = corrections.take_back(draft, event)
    charge(draft, event, terms, back)
    corrections.let_go(draft, back)
    corrections.report(draft, back)
    return "corrected"


def _priced(
    account: Account, event: UsageEvent, terms: Terms, duration_s: int
) -> tuple[Tariff, str, Charge]:
    """The deck in force, the digits of the number, and what so many seconds of a leg cost. Raises
    RefusedError when nothing says it."""
    if terms.decks is None and not account.standing.decks:
        tariff = terms.tariff
    else:
        tariff = _tariff_of(account, event, terms, duration_s)
    digits = coverage.digits_of(event.callee)
    rate = None if digits is None else tariff.find(digits)
    if digits is None or rate is None:
        raise unrated(tariff, digits or "", duration_s)
    return tariff, digits, _cost(tariff, rate, digits, event, duration_s)


def _cost(
    tariff: Tariff, rate: Rate, digits: str, event: UsageEvent, duration_s: int, minutes: int = 0
) -> Charge:
    """What a call costs after its first `minutes`, which pools have paid: the rest like a call of
    its own, at the prices of its place in this one; nothing when nothing is left, no fee either."""
    begin = minutes * _MINUTE_S
    if begin and begin >= duration_s:
        return Charge(0, rate, 0)
    if rate.special is None:
        return rating.price(rate, duration_s - begin)
    found = rating.price_special(tariff, digits, event.started_at, duration_s, begin)
    if found is None:
        raise unrated(tariff, digits, duration_s)
    return found


def _hold(draft: Draft, event: UsageEvent, terms: Terms, duration_s: int, kind: Kind) -> str:
    """Hold the price of that many seconds of an open leg. What is free, and what pools can pay as
    they are now, is not held.

    A call without a price holds nothing either; it is its end that becomes a dead letter.
    """
    hold = event.hold
    if (hold is not None and hold.ended) or not holds.is_alive(event, draft.now):
        return "open"
    account = draft.account
    try:
        tariff, digits, priced = _priced(account, event, terms, duration_s)
    except RefusedError:
        return "open"
    if coverage.depends_on_country(event, kind):
        kind = coverage.towards(event, kind, priced.rate.country)
        if kind in terms.coverage.free:
            return "open"
    if account.standing.pools:
        apart = Draft(account, event.cause, draft.now)
        rate = priced.rate
        taken = pools.take(apart, event, duration_s, kind, rate, terms.coverage)
        if taken:
            priced = _cost(tariff, rate, digits, event, duration_s, pools.minutes_of(taken))
    holds.place(draft, event, priced.amount_nanos)
    return "open"


def _tariff_of(account: Account, event: UsageEvent, terms: Terms, duration_s: int) -> Tariff:
    """The deck in force when the call started: the tenant's own, or the default one. Raises
    RefusedError while the tenant's deck is not published: another's prices would be wrong."""
    started_at = event.started_at
    deck = terms.tariff.deck
    for assigned in account.standing.decks:
        if assigned.effective_from <= started_at:
            deck = assigned.deck
    found: Tariff | None = None
    if terms.decks is not None:
        found = terms.decks.in_force(deck, started_at)
    elif deck == terms.tariff.deck:
        found = terms.tariff
    if found is None:
        digits = coverage.digits_of(event.callee) or ""
        raise unrated(terms.tariff, digits, duration_s, "$.tenant_id")
    return found


def unrated(tariff: Tariff, digits: str, duration_s: int, path: str = "$.callee") -> RefusedError:
    """No row: booked nowhere. What it may cost is estimated by the dearest row that begins like
    the number, so that somebody can see how much money waits for a mended deck."""
    near = tariff.dearest_near(digits)
    exposure_nanos = None if near is None else rating.price(near, duration_s).amount_nanos
    return RefusedError(DeadLetterReason.UNRATED, path, exposure_nanos)


def billable(account: Account, started_at: datetime) -> bool:
    """Whether usage that started then is this account's: it was open then, now or formerly."""
    standing = account.standing
    if started_at >= standing.billing_from and (
        standing.closed_at is None or started_at < standing.closed_at
    ):
        return True
    return any(one.since <= started_at < one.until for one in standing.former)
