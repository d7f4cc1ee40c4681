"""Corrections: what an event has caused is taken back, and what it should have said is booked.

A correction names an event of its own source. The entries which that event has caused enter with
it; every charge among them is reversed, once. The new content is charged like any usage and may
be nothing at all. Entries say both ways what belongs together: see `schemas.ledger.Links`.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from schemas import topics
from schemas.ledger import EntryKind, Links
from schemas.nanos import nanos_from, text_from
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing import granting, grants, pools, recharge
from streams.billing.booking import Draft, RefusedError, Told
from streams.billing.events import UsageEvent
from streams.billing.outcomes import Burnt
from streams.billing.parts import Grant


class Back(Struct, frozen=True, gc=False):
    """What was taken back: the links for the new charge, how much money came back, when the first
    of it had been charged. `first` is what lots have by it that they cannot keep, for they have
    expired or been voided, or have been set back and now exceed their amount; `voided` are the
    lots that were voided."""

    links: Links
    nanos: int
    booked_at: datetime | None
    first: Mapping[str, int]
    voided: frozenset[str]


def take_back(draft: Draft, event: UsageEvent) -> Back:
    """Reverse every charge of the event that this one corrects.

    Raises RefusedError (`refused`) when nobody remembers such an event, when it is corrected
    already, when it was another tenant's, or when it was no usage.
    """
    corrects, original = event.corrects, event.original
    if corrects is None or original is None:
        raise RefusedError(DeadLetterReason.REFUSED, "$.corrects")
    for entry in original:
        if entry.tenant_id != draft.account.tenant_id or entry.caused_by.topic not in topics.USAGE:
            raise RefusedError(DeadLetterReason.REFUSED, "$.corrects")
    links = Links(corrects)
    total_nanos = 0
    booked_at: datetime | None = None
    voided = frozenset(one.grant.id for one in draft.account.standing.spent if one.voided)
    for entry in original:
        if entry.kind is not EntryKind.CHARGE and entry.kind is not EntryKind.POOL:
            continue
        amount_nanos = -nanos_from(entry.amount)
        shares = [(used.id, -nanos_from(used.amount)) for used in entry.grants]
        fresh = draft.new_lot(amount_nanos)
        burnt = _given_back(draft, shares, amount_nanos, fresh)
        links = Links(corrects, entry.seq)
        told: Told = (entry.usage_kind, entry.call_id, entry.callee, False, False, None)
        details: dict[str, Any] = {"links": links}
        if any(grant.id == fresh.id for grant, _ in burnt.touched):
            details["expires_at"] = fresh.expires_at
        if entry.pools:
            details["pools"] = pools.give_back(draft, entry.pools)
        draft.book(EntryKind.REVERSAL, amount_nanos, burnt, entry.at, details, told)
        total_nanos += amount_nanos
        booked_at = booked_at or entry.booked_at
    first: dict[str, int] = {}
    for grant in draft.account.grants:
        if grant.id in voided or not grants.active(grant, draft.now):
            first[grant.id] = grant.left_nanos
        elif grant.left_nanos > grant.amount_nanos:
            first[grant.id] = grant.left_nanos - grant.amount_nanos
    return Back(links, total_nanos, booked_at, first, voided)


def _given_back(
    draft: Draft, shares: Sequence[tuple[str, int]], amount_nanos: int, fresh: Grant
) -> Burnt:
    """What the lots are with their money back. A row that is full makes room for those that have
    left it."""
    merged: tuple[tuple[Grant, int], ...] = ()
    while True:
        burnt = grants.give_back(draft.account, shares, amount_nanos, fresh)
        more = len(burnt.grants) - len(draft.account.grants)
        if grants.lots_of(draft.account) + more <= grants.MOST_LOTS:
            return Burnt(burnt.grants, burnt.overdraft_nanos, merged + burnt.touched)
        draft.account, moved = grants.make_room(draft.account)
        merged += moved


def let_go(draft: Draft, back: Back) -> None:
    """What came back to lots that cannot keep it and was not needed goes again as it went
    before: it is void, it expires, or the lot is set back."""
    for grant in draft.account.grants:
        if grant.id in back.voided:
            granting.take(draft, EntryKind.VOID, grant, draft.now)
        elif grant.expires_at is not None and grant.expires_at <= draft.now:
            granting.expire(draft, grant)
        elif grant.left_nanos > grant.amount_nanos:
            whole = replace(grant, left_nanos=grant.amount_nanos)
            draft.put_in(EntryKind.GRANT, whole, draft.now)
    draft.account = grants.trimmed(draft.account)


def report(draft: Draft, back: Back) -> None:
    """Tell of recharges asked for since the wrong charge that the right one would not have
    brought about. They are never undone."""
    if back.booked_at is None:
        return
    # Both are on the books by now; what lies between them is what was charged too much.
    charged = sum(nanos for kind, nanos in draft.moved if kind is EntryKind.CHARGE)
    for attempt in recharge.unneeded(draft.account, back.booked_at, back.nanos + charged):
        draft.notify(
            NoticeKind.RECHARGE_UNNEEDED,
            recharge_id=recharge.recharge_id(
                draft.account.tenant_id, attempt.epoch, attempt.attempt
            ),
            amount=text_from(attempt.amount_nanos),
            epoch=attempt.epoch,
            attempt=attempt.attempt,
        )
