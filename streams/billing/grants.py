"""Grants: lots of money, burnt in a fixed order, expiring each at its own instant.

Order: lower priority number, earliest expiry (none last), promotional before paid, earliest
created, id. A row keeps its grants in that order. Usage is always booked: lots active when it
happened burn first, then lots active now, and only then the overdraft grows.

A row holds a bounded number of lots. When one more comes, what is left of an expired lot is let
go; when there is none, the two lots of one kind and priority that expire nearest to each other
become one, with the later expiry.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Final

from msgspec.structs import replace

from streams.billing.account import Account
from streams.billing.outcomes import Burnt
from streams.billing.parts import WARNINGS, Grant, LotKind, Spent, forgotten_at, microseconds

_LAST: Final = datetime.max.replace(tzinfo=UTC)
# Lots of a row: active, to come, and expired within grace. They take 1.7 kilobytes at most.
MOST_LOTS: Final = 24
# An event can be corrected as long as its id is remembered: to the end of its week, and 35 days.
SPENT_KEPT: Final = timedelta(days=43)
_DAY: Final = 86_400_000_000


def burn_order(grant: Grant) -> tuple[int, datetime, bool, datetime, str]:
    """The sort key in which grants are burnt."""
    return (
        grant.priority,
        grant.expires_at or _LAST,
        grant.kind is LotKind.PAID,
        grant.created_at,
        grant.id,
    )


def ordered(lots: Iterable[Grant]) -> tuple[Grant, ...]:
    """Lots in the order in which they are burnt."""
    return tuple(sorted(lots, key=burn_order))


def active(grant: Grant, at: datetime) -> bool:
    """Whether a grant can pay for something at an instant."""
    return grant.effective_at <= at and (grant.expires_at is None or at < grant.expires_at)


def burn(account: Account, amount_nanos: int, at: datetime, now: datetime) -> Burnt:
    """Take an amount for usage that ended at `at`: from lots active then, then from lots active
    now, then from nowhere. A lot that is used up leaves the row; the ledger remembers it."""
    if not account.grants:
        return Burnt((), account.overdraft_nanos + amount_nanos, ())
    # Nearly every charge: the first lot can pay it alone and something is left in it.
    grants = account.grants
    first = grants[0]
    left_nanos = first.left_nanos - amount_nanos
    if left_nanos > 0 and (active(first, at) or (len(grants) == 1 and active(first, now))):
        after = replace(first, left_nanos=left_nanos)
        return Burnt((after, *grants[1:]), account.overdraft_nanos, ((after, -amount_nanos),))
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
    """Add a lot that is active: it first pays the overdraft, the rest takes its place in the burn
    order."""
    pays = min(account.overdraft_nanos, grant.left_nanos)
    rest = replace(grant, left_nanos=grant.left_nanos - pays)
    grants = account.grants
    if rest.left_nanos:
        grants = ordered((*grants, rest))
    return Burnt(grants, account.overdraft_nanos - pays, ((rest, rest.left_nanos),))


def set_back(account: Account, grant: Grant) -> tuple[Burnt, int]:
    """Give a lot what it has in `grant`, whatever is left of it, and say by how much the balance
    grows. A lot that is not there is put in."""
    had_nanos = 0
    others = account.grants
    for one in account.grants:
        if one.id == grant.id:
            had_nanos = one.left_nanos
            others = tuple(other for other in account.grants if other is not one)
    burnt = put_in(account.changed(grants=others), grant)
    rest, got_nanos = burnt.touched[0]
    moved = ((rest, got_nanos - had_nanos),)
    return Burnt(burnt.grants, burnt.overdraft_nanos, moved), grant.left_nanos - had_nanos


def rolled_over(left_nanos: int, least_nanos: int, most_nanos: int | None) -> int:
    """What a lot keeps when a period ends: no less than its minimum, no more than its maximum."""
    kept_nanos = max(least_nanos, left_nanos)
    return kept_nanos if most_nanos is None else min(most_nanos, kept_nanos)


def reopened(
    account: Account, amount_nanos: int, at: datetime, now: datetime
) -> list[tuple[Grant, int]]:
    """What usage that ended at `at` needs of lots that have expired since, in burn order."""
    lots = [(one, False) for one in account.grants]
    lots += [(one, True) for one in account.standing.lapsed if now < forgotten_at(one)]
    needs = []
    left_nanos = amount_nanos
    for lot, has_lapsed in sorted(lots, key=lambda one: burn_order(one[0])):
        if not left_nanos:
            break
        if active(lot, at):
            taken_nanos = min(lot.left_nanos, left_nanos)
            left_nanos -= taken_nanos
            if has_lapsed:
                needs.append((lot, taken_nanos))
    return needs


def lots_of(account: Account) -> int:
    """How many lots a row holds, whatever they are."""
    return len(account.grants) + len(account.standing.planned) + len(account.standing.lapsed)


def has_room(account: Account) -> bool:
    """Whether one more lot fits, letting go or merging what may be."""
    return (
        lots_of(account) < MOST_LOTS
        or bool(account.standing.lapsed)
        or _nearest(account, alike=True) is not None
    )


def make_room(account: Account) -> tuple[Account, tuple[tuple[Grant, int], ...]]:
    """A full row with one lot less, and what moved between lots. Of no kind and priority there may
    be two: then the nearest of all become one."""
    if account.standing.lapsed:
        soonest = min(account.standing.lapsed, key=forgotten_at)
        lapsed = tuple(one for one in account.standing.lapsed if one is not soonest)
        return account.changed(lapsed=lapsed), ()
    pair = _nearest(account, alike=True) or _nearest(account, alike=False)
    assert pair is not None, "lots to come are too few to fill a row"
    sooner, later = pair
    gone = replace(sooner, left_nanos=0)
    merged = replace(
        later,
        amount_nanos=later.amount_nanos + sooner.amount_nanos,
        left_nanos=later.left_nanos + sooner.left_nanos,
        effective_at=max(later.effective_at, sooner.effective_at),
    )
    kept = (one for one in account.grants if one is not sooner and one is not later)
    moved = ((gone, -sooner.left_nanos), (merged, sooner.left_nanos))
    return account.changed(grants=ordered((*kept, merged))), moved


def _nearest(account: Account, *, alike: bool) -> tuple[Grant, Grant] | None:
    """The two lots that expire nearest to each other, the sooner first; of equals, those that burn
    first. One that is set back to its amount stays alone."""
    recurring = {one.id for one in account.standing.planned}
    lots = [one for one in account.grants if one.id not in recurring]
    lots.sort(key=lambda one: one.expires_at or _LAST)
    pairs = (
        pair
        for pair in combinations(lots, 2)
        if not alike or (pair[0].kind, pair[0].priority) == (pair[1].kind, pair[1].priority)
    )
    return min(
        pairs,
        key=lambda pair: (pair[1].expires_at or _LAST) - (pair[0].expires_at or _LAST),
        default=None,
    )


def with_spent(
    account: Account, before: tuple[Grant, ...], now: datetime, *, void: bool
) -> Account:
    """Remember the lots that were in the row and are no longer. One that was voided once stays so,
    whatever becomes of what a correction gives back to it."""
    here = {grant.id for grant in account.grants}
    left = [grant for grant in before if grant.id not in here]
    voided = {one.grant.id for one in account.standing.spent if one.voided}
    gone = {grant.id for grant in left}
    today = microseconds(now) // _DAY
    first = today - SPENT_KEPT.days
    kept = [one for one in account.standing.spent if one.day > first and one.grant.id not in gone]
    for grant in left:
        bare = replace(grant, left_nanos=0, warnings=0)
        kept.append(Spent(bare, today, void or grant.id in voided))
    return trimmed(account.changed(spent=tuple(kept)))


def trimmed(account: Account) -> Account:
    """No lot remembered that is back in the row, and no more than have place beside those of the
    row: the last that left it. What an older one burnt comes back as a lot of its own."""
    here = {grant.id for grant in account.grants}
    spent = tuple(one for one in account.standing.spent if one.grant.id not in here)
    room = max(0, MOST_LOTS - lots_of(account))
    spent = spent[max(0, len(spent) - room) :]
    return account if len(spent) == len(account.standing.spent) else account.changed(spent=spent)


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
        one.grant.id: replace(one.grant, warnings=warnings_left(one.grant.expires_at, now))
        for one in account.standing.spent
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
        grants = ordered((*untouched, *(grant for grant, _ in touched)))
    return Burnt(grants, account.overdraft_nanos - pays, tuple(touched))


def burn_first(
    account: Account, first: Mapping[str, int], amount_nanos: int, at: datetime, now: datetime
) -> Burnt:
    """Take an amount from certain lots, dead or alive, from each so much at most, and what they do
    not give as `burn` does."""
    left = amount_nanos
    kept: list[Grant] = []
    touched: dict[str, tuple[Grant, int]] = {}
    for grant in account.grants:
        taken = min(first.get(grant.id, 0), grant.left_nanos, left)
        left -= taken
        after = grant
        if taken:
            after = replace(grant, left_nanos=grant.left_nanos - taken)
            touched[grant.id] = (after, -taken)
        if after.left_nanos:
            kept.append(after)
    if not left:
        return Burnt(tuple(kept), account.overdraft_nanos, tuple(touched.values()))
    rest = burn(account.changed(grants=tuple(kept)), left, at, now)
    for grant, nanos in rest.touched:
        # A lot may have given twice; an entry names it once.
        before = touched.get(grant.id)
        touched[grant.id] = (grant, nanos if before is None else before[1] + nanos)
    return Burnt(rest.grants, rest.overdraft_nanos, tuple(touched.values()))


def expired(grants: Iterable[Grant], at: datetime) -> tuple[Grant, ...]:
    """The lots that have ended at or before an instant."""
    return tuple(
        grant for grant in grants if grant.expires_at is not None and grant.expires_at <= at
    )


def warnings_left(expires_at: datetime | None, now: datetime) -> int:
    """How often people will be told that a lot expires; 0 when there is nothing more to say."""
    if expires_at is None:
        return 0
    return sum(expires_at - before > now for before in WARNINGS)
