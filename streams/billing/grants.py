"""Grants: lots of money, burnt in a fixed order, expiring each at its own instant.

Order: lower priority number, earliest expiry (none last), promotional before paid, earliest
created, id. A row keeps its grants in that order. Usage is always booked: lots active when it
happened burn first, then lots active now, and only then the overdraft grows.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec.structs import replace

from schemas.commands import GrantKind
from streams.billing.account import Account, Grant
from streams.billing.outcomes import Burnt

_LAST: Final = datetime.max.replace(tzinfo=UTC)
# Expiry is told this long before it.
WARNINGS: Final = (timedelta(days=30), timedelta(days=7))


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
