"""Granting: lots by command, voiding them, and what time does to lots.

The books know a lot from the instant it is active: then its `grant` entry is booked, and it pays
what was overdrawn. Before, it is a plan in the row and in no balance, so that the entries sum to
the balance at any time.
"""

from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final

from msgspec.structs import replace

from schemas.commands import Grant as GrantCommand
from schemas.commands import GrantKind, Void
from schemas.ledger import EntryKind
from schemas.nanos import text_from
from schemas.notices import NoticeKind
from streams.billing import grants
from streams.billing.booking import PAID_MONTHS, CommandRefusedError, Draft, months_later
from streams.billing.events import Cause
from streams.billing.legs import utc
from streams.billing.outcomes import Burnt
from streams.billing.parts import Grant, LotKind, Planned, forgotten_at

# Lots to come; the rest of a row's lots are then enough to make room among.
MOST_PLANNED: Final = 8
BEGINS_WITHIN: Final = timedelta(days=5 * 366)
# An instant of this calendar's first centuries is ten bytes in a row, a later one fifteen.
EXPIRES_WITHIN: Final = timedelta(days=100 * 366)
_ID_LENGTH: Final = 12


def grant_id_of(cause: Cause) -> str:
    """The id of a command's lot: derived, so that a replay makes it again."""
    identity = f"{cause.source}\0{cause.id}".encode()
    return f"c{sha256(identity).hexdigest()[:_ID_LENGTH]}"


def grant(draft: Draft, command: GrantCommand, amount_nanos: int) -> str:
    """Put a lot in now, or plan it; returns its id. Raises CommandRefusedError."""
    now = draft.now
    begins_at = now if command.effective_at is None else utc(command.effective_at)
    if abs(begins_at - now) > BEGINS_WITHIN:
        raise CommandRefusedError("effective_at", "A grant begins within five years.")
    expires_at = None if command.expires_at is None else utc(command.expires_at)
    if expires_at is None and command.kind is GrantKind.PAID:
        expires_at = months_later(max(begins_at, now), PAID_MONTHS)
    check_end(expires_at, now)
    if expires_at is not None and expires_at <= begins_at:
        raise CommandRefusedError("expires_at", "expires_at must be after effective_at.")
    if command.every_days is not None and command.every_months is not None:
        raise CommandRefusedError("recurrence", "Give every_days or every_months, not both.")
    planned = Planned(
        id=grant_id_of(draft.cause),
        kind=LotKind[command.kind.name],
        priority=command.priority,
        amount_nanos=amount_nanos,
        at=begins_at,
        begins_at=begins_at,
        expires_at=expires_at,
        created_at=now,
        every_days=command.every_days or 0,
        every_months=command.every_months or 0,
    )
    following = planned if begins_at > now else _following(planned, now)
    if following is not None:
        _plan(draft, following)
    if begins_at <= now:
        if not grants.has_room(draft.account):
            raise _full()
        draft.put_in(EntryKind.GRANT, _lot(planned, now), now, {"reason": command.reason})
    return planned.id


def check_end(expires_at: datetime | None, now: datetime) -> None:
    """Raise CommandRefusedError unless a lot can end then."""
    if expires_at is None:
        return
    if expires_at <= now:
        raise CommandRefusedError("expires_at", "expires_at must be in the future.")
    if expires_at - now > EXPIRES_WITHIN:
        raise CommandRefusedError(
            "expires_at", "A grant ends within a hundred years; without expires_at it never does."
        )


def _plan(draft: Draft, planned: Planned) -> None:
    account = draft.account
    if len(account.standing.planned) >= MOST_PLANNED:
        raise CommandRefusedError(
            "too_many_planned",
            f"{MOST_PLANNED} grants of this tenant are still to come; void one of them first.",
        )
    if grants.lots_of(account) >= grants.MOST_LOTS:
        if not account.standing.lapsed:
            raise _full()
        account, _ = grants.make_room(account)
    draft.account = grants.trimmed(account.changed(planned=(*account.standing.planned, planned)))


def _full() -> CommandRefusedError:
    return CommandRefusedError(
        "too_many_grants",
        f"A tenant has at most {grants.MOST_LOTS} lots, and no two of one kind and priority can be "
        "put together; give the kind and priority of a lot that is there, or void one.",
    )


def _lot(planned: Planned, now: datetime) -> Grant:
    """The lot as it is put in, with all its money."""
    return Grant(
        id=planned.id,
        kind=planned.kind,
        priority=planned.priority,
        amount_nanos=planned.amount_nanos,
        left_nanos=planned.amount_nanos,
        effective_at=planned.at,
        expires_at=planned.expires_at,
        created_at=planned.created_at,
        warnings=grants.warnings_left(planned.expires_at, now),
    )


def _following(planned: Planned, after: datetime) -> Planned | None:
    """The plan for the first period that begins after an instant; None when none does."""
    if planned.every_days:
        at = next_day(planned.begins_at, planned.every_days, after)
    elif planned.every_months:
        at = next_month(planned.begins_at, planned.every_months, after)
    else:
        return None
    if planned.expires_at is not None and planned.expires_at <= at:
        return None
    return replace(planned, at=at)


def next_day(anchor: datetime, every_days: int, after: datetime) -> datetime:
    """The first instant after another one that is whole periods of days away from an anchor."""
    period = timedelta(days=every_days)
    return anchor + ((after - anchor) // period + 1) * period


def next_month(anchor: datetime, every_months: int, after: datetime) -> datetime:
    """The first instant after another one that is whole periods of months after an anchor; counted
    from it, so that a period that begins on a 31st does so again after a short month."""
    apart = (after.year - anchor.year) * 12 + after.month - anchor.month
    periods = max(1, apart // every_months)
    while months_later(anchor, periods * every_months) <= after:
        periods += 1
    return months_later(anchor, periods * every_months)


def void(draft: Draft, command: Void) -> str:
    """Take what is left of a lot, and what is to come of it; returns its id. Raises
    CommandRefusedError."""
    account = draft.account
    grant_id = command.grant_id
    planned = tuple(one for one in account.standing.planned if one.id != grant_id)
    lot = next((one for one in account.grants if one.id == grant_id), None)
    if lot is None and len(planned) == len(account.standing.planned):
        if any(one.id == grant_id for one in account.standing.lapsed):
            raise CommandRefusedError(
                "grant_expired", f"{grant_id} has expired; there is nothing left to take."
            )
        if not _may_have_been(grant_id, account.seq):
            raise CommandRefusedError(
                "unknown_grant",
                f"There has never been a grant {grant_id}; `credits grants` lists what there is.",
            )
        raise CommandRefusedError(
            "nothing_left",
            f"Nothing is left of {grant_id}: it is used up, void, expired or became one with "
            "another. The ledger says which; `credits grants` lists what there is.",
        )
    draft.account = account.changed(planned=planned)
    if lot is not None:
        take(draft, EntryKind.VOID, lot, draft.now, reason=command.reason)
    return grant_id


def _may_have_been(grant_id: str, seq: int) -> bool:
    """Whether an id looks like one of ours: of an entry that is there, or of some command."""
    if grant_id[:1] == "g":
        return grant_id[1:].isdecimal() and int(grant_id[1:]) <= seq
    return grant_id[:1] == "c" and len(grant_id) == 1 + _ID_LENGTH


def expire(draft: Draft, lot: Grant) -> None:
    """Book that the rest of a lot has expired, at its instant, keep it for usage of before that
    comes late, and tell of it."""
    assert lot.expires_at is not None
    take(draft, EntryKind.EXPIRY, lot, lot.expires_at)
    if draft.now < forgotten_at(lot):
        lapsed = draft.account.standing.lapsed
        # What a correction has given back to it joins what was left before.
        rest_nanos = sum(one.left_nanos for one in lapsed if one.id == lot.id)
        kept = tuple(one for one in lapsed if one.id != lot.id)
        rest = replace(lot, left_nanos=lot.left_nanos + rest_nanos)
        draft.account = grants.trimmed(draft.account.changed(lapsed=(*kept, rest)))
    draft.notify(NoticeKind.GRANT_EXPIRED, grant_id=lot.id, amount=text_from(lot.left_nanos))


def take(
    draft: Draft, kind: EntryKind, lot: Grant, at: datetime, reason: str | None = None
) -> None:
    """Book that all that is left of a lot is gone."""
    kept = tuple(one for one in draft.account.grants if one is not lot)
    gone = replace(lot, left_nanos=0)
    burnt = Burnt(kept, draft.account.overdraft_nanos, ((gone, -lot.left_nanos),))
    draft.book(kind, -lot.left_nanos, burnt, at, {} if reason is None else {"reason": reason})


def pass_time(draft: Draft, at: datetime) -> None:
    """Lots that have ended by an instant, those that begin, and what is needed no more."""
    for lot in grants.expired(draft.account.grants, at):
        expire(draft, lot)
    if draft.account.standing.planned:
        _begin(draft, at)
    if any(forgotten_at(one) <= at for one in draft.account.standing.lapsed):
        kept = tuple(one for one in draft.account.standing.lapsed if forgotten_at(one) > at)
        draft.account = draft.account.changed(lapsed=kept)


def _begin(draft: Draft, at: datetime) -> None:
    """Put in what begins, in burn order, and plan the next period. An allowance rests while the
    account is closed."""
    due = [one for one in draft.account.standing.planned if one.at <= at]
    for planned in sorted(due, key=lambda one: grants.burn_order(_lot(one, draft.now))):
        others = tuple(one for one in draft.account.standing.planned if one.id != planned.id)
        following = _following(planned, planned.at)
        later = others if following is None else (*others, following)
        draft.account = draft.account.changed(planned=later)
        lot = _lot(planned, draft.now)
        has = next((one.left_nanos for one in draft.account.grants if one.id == lot.id), 0)
        rests = draft.account.standing.closed_at is not None and (
            planned.every_days or planned.every_months
        )
        if rests or has == lot.left_nanos:
            continue
        draft.put_in(EntryKind.GRANT, lot, planned.at)
        draft.notify(
            NoticeKind.GRANT_ACTIVE,
            grant_id=lot.id,
            amount=text_from(lot.left_nanos - has),
            balance=text_from(draft.balance_nanos),
            expires_at=lot.expires_at,
        )
