"""Grants: lots of money, burnt in a fixed order, expiring each at its own instant.

Order: lower priority number, earliest expiry (none last), promotional before paid, earliest
created, id. A row keeps its grants in that order. Usage is always booked: lots active when it
happened burn first, then lots active now, and only then the overdraft grows.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec.structs import replace

from schemas.commands import GrantKind
from streams.billing.account import Account, Grant, Spent
from streams.billing.outcomes import Burnt

_LAST: Final = datetime.max.replace(tzinfo=UTC)
# Expiry is told this long before it.
WARNINGS: Final = (timedelta(days=30), timedelta(days=7))
# An event can be corrected as long as its id is remembered: to the end of its week, and 35 days.
SPENT_KEPT: Final = timedelta(days=43)
# Of one account; what an older one burnt comes back as a lot of its own.
MOST_SPENT: Final = 100


def burn_order(grant: Grant) -> tuple[int, datetime, bool, datetime, str]:
    """The sort key in which grants are burnt."""
    return (
        grant.priority,
        grant.expires_at or _LAST,
        grant.kind is GrantKind.PAID,
        grant.created_at,
        grant.id,
    )


def active(grant: Grant, at: datetime) -> bool:
    """Whether a grant can pay for something at an instant."""
    return grant.effective_at <= at and (grant.expires_at is None or at < grant.expires_at)


def burn(account: Account, amount_nanos: int, at: datetime, now: datetime) -> Burnt:
    """Take an amount for usage that ended at `at`: from lots active then, then from lots active
    now, then from nowhere. A lot that is used up leaves the row; the ledger remembers it."""
    if not account.grants:
        return Burnt((), account.overdraft_nanos + amount_nanos, ())
    else:
        # Nearly every charge: the first lot can pay it alone and something is left in it.
        first = account.grants[0]
        expires_at = first.expires_at
        if (
            first.left_nanos > amount_nanos
            and first.effective_at <= at
            and (expires_at is None or at < expires_at)
        ):
            after = replace(first, left_nanos=first.left_nanos - amount_nanos)
            grants = (after, *account.grants[1:])
            return Burnt(grants, account.overdraft_nanos, ((after, -amount_nanos),))
    left = amount_nanos
    given: dict[str, int] = {}
    for instant in (at, now):
        for grant in account.grants:
            if not left:
                break
            rest = grant.left_nanos - given.get(grant.id, 0)
            if rest and active(grant, instant):
                taken = min(rest, left)
                given[grant.id] = given.get(grant.id, 0) + taken
                left -= taken
        if not left or at == now:
            break
    kept: list[Grant] = []
    touched: list[tuple[Grant, int]] = []
    for grant in account.grants:
        taken = given.get(grant.id, 0)
        if not taken:
            kept.append(grant)
            continue
        after = replace(grant, left_nanos=grant.left_nanos - taken)
        touched.append((after, -taken))
        if after.left_nanos:
            kept.append(after)
    return Burnt(tuple(kept), account.overdraft_nanos + left, tuple(touched))


def put_in(account: Account, grant: Grant) -> Burnt:
    """Add a lot: it first pays the overdraft, the rest takes its place in the burn order.

    A grant that is not active yet pays nothing before it is.
    """
    pays = min(account.overdraft_nanos, grant.left_nanos)
    rest = replace(grant, left_nanos=grant.left_nanos - pays)
    grants = account.grants
    if rest.left_nanos:
        grants = tuple(sorted((*grants, rest), key=burn_order))
    return Burnt(grants, account.overdraft_nanos - pays, ((rest, rest.left_nanos),))


def with_spent(
    account: Account, before: tuple[Grant, ...], now: datetime, *, void: bool
) -> Account:
    """Remember the lots that were in the row and are no longer. One that was voided once stays so,
    whatever becomes of what a correction gives back to it."""
    here = {grant.id for grant in account.grants}
    left = [grant for grant in before if grant.id not in here]
    voided = {one.grant.id for one in account.spent if one.voided}
    gone = {grant.id for grant in left} | here
    first = now - SPENT_KEPT
    kept = [one for one in account.spent if one.at > first and one.grant.id not in gone]
    for grant in left:
        bare = replace(grant, left_nanos=0, warn_at=None)
        kept.append(Spent(bare, now, void or grant.id in voided))
    return replace(account, spent=tuple(kept[-MOST_SPENT:]))


def give_back(
    account: Account, shares: Sequence[tuple[str, int]], amount_nanos: int, fresh: Grant
) -> Burnt:
    """Undo a burning: pay the overdraft, then return to the lots what they gave (`shares`, in the
    order in which they burnt).

    The lots that burnt last get theirs first, for what the overdraft takes would burn the first
    ones. What is left over had been overdrawn and paid by other money since, or came from a lot
    that nobody remembers: it becomes the lot `fresh`. Lots that are dead by now come back too;
    who calls lets them go again.
    """
    pays = min(account.overdraft_nanos, amount_nanos)
    left = amount_nanos - pays
    now = fresh.effective_at
    lots = {
        one.grant.id: replace(one.grant, warn_at=first_warning(one.grant.expires_at, now))
        for one in account.spent
    }
    lots.update((grant.id, grant) for grant in account.grants)
    got: dict[str, int] = {}
    for grant_id, share in reversed(shares):
        if left and grant_id in lots:
            part = min(share, left)
            got[grant_id] = part
            left -= part
    touched: list[tuple[Grant, int]] = []
    for grant_id, part in got.items():
        grant = lots[grant_id]
        touched.append((replace(grant, left_nanos=grant.left_nanos + part), part))
    if left:
        touched.append((replace(fresh, amount_nanos=left, left_nanos=left), left))
    grants = account.grants
    if touched:
        untouched = [grant for grant in grants if grant.id not in got]
        grants = tuple(sorted((*untouched, *(grant for grant, _ in touched)), key=burn_order))
    return Burnt(grants, account.overdraft_nanos - pays, tuple(touched))


def burn_first(
    account: Account, first: Collection[str], amount_nanos: int, at: datetime, now: datetime
) -> Burnt:
    """Take an amount from certain lots, dead or alive, and what they cannot give as `burn` does."""
    left = amount_nanos
    kept: list[Grant] = []
    touched: list[tuple[Grant, int]] = []
    for grant in account.grants:
        taken = min(grant.left_nanos, left) if grant.id in first else 0
        left -= taken
        after = grant
        if taken:
            after = replace(grant, left_nanos=grant.left_nanos - taken)
            touched.append((after, -taken))
        if after.left_nanos:
            kept.append(after)
    if not left:
        return Burnt(tuple(kept), account.overdraft_nanos, tuple(touched))
    rest = burn(replace(account, grants=tuple(kept)), left, at, now)
    return Burnt(rest.grants, rest.overdraft_nanos, (*touched, *rest.touched))


def expired(grants: Iterable[Grant], at: datetime) -> tuple[Grant, ...]:
    """The lots that have ended at or before an instant."""
    return tuple(
        grant for grant in grants if grant.expires_at is not None and grant.expires_at <= at
    )


def first_warning(expires_at: datetime | None, now: datetime) -> datetime | None:
    """When people are told next that a lot will expire; None when there is nothing more to say."""
    if expires_at is None:
        return None
    for before in WARNINGS:
        if expires_at - before > now:
            return expires_at - before
    return None
