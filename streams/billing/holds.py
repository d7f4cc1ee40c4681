"""Holds: money set aside for open calls, so that it can be asked for while they last.

A hold belongs to a leg. Whatever the order in which the phases of a leg arrive, the hold stands for
the latest sign of life that has arrived, and a leg that has ended holds nothing any more.
"""

from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final

import msgspec

from schemas.nanos import MAX_EVENT_NANOS, text_from
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing.booking import Draft, RefusedError
from streams.billing.events import UsageEvent
from streams.billing.parts import Hold

# The next sign of life is expected within a minute: until then it is paid for in advance.
AHEAD_S: Final = 60
# A platform that is gone ends no calls.
LIVES: Final = timedelta(minutes=3)
# Each is a row. Further open calls hold nothing, until there are a twentieth fewer.
MOST_HOLDS: Final = 5_000
_ROOM_AGAIN: Final = MOST_HOLDS * 95 // 100
# As much as one event may move: what is available then still fits an amount on the wire.
MOST_HELD_NANOS: Final = MAX_EVENT_NANOS

_pack: Final = msgspec.msgpack.Encoder().encode


def leg_of(event: UsageEvent) -> str:
    """The name of a leg within its tenant: a hash, for ids may be long and hold numbers. Phases
    without a `leg_id` belong together when source, call, callee and start are the same."""
    if event.leg_id is not None:
        named = _pack(event.leg_id)
    else:
        named = _pack((event.cause.source, event.call_id, event.callee, event.started_at))
    return sha256(named).hexdigest()[:32]


def is_alive(event: UsageEvent, now: datetime) -> bool:
    """Whether a sign of life is young enough to hold money."""
    return event.ended_at > now - LIVES


def place(draft: Draft, event: UsageEvent, nanos: int) -> None:
    """Hold that much for an open leg instead of what it held before; what came out of order only
    keeps the hold alive. Raises RefusedError(`overflow`)."""
    account = draft.account
    hold = event.hold
    elapsed_s = event.duration_s or 0
    until = _until(draft, event)
    if hold is None:
        if not nanos:
            return
        if account.standing.holds >= MOST_HOLDS:
            _tell_of_many(draft)
            return
    elif elapsed_s < hold.elapsed_s:
        nanos, elapsed_s = hold.nanos, hold.elapsed_s
    placed = Hold(nanos=nanos, elapsed_s=elapsed_s, until=until)
    if placed == hold:
        return
    draft.hold = placed
    exposure_nanos = account.standing.exposure_nanos + nanos - (0 if hold is None else hold.nanos)
    if exposure_nanos > MOST_HELD_NANOS:
        raise RefusedError(DeadLetterReason.OVERFLOW)
    if hold is None or exposure_nanos != account.standing.exposure_nanos:
        draft.account = account.changed(
            exposure_nanos=exposure_nanos, holds=account.standing.holds + (hold is None)
        )


def end(draft: Draft, event: UsageEvent) -> None:
    """A leg has ended: release what it held, and remember its end for as long as a phase of it
    could come late and still hold money."""
    hold = event.hold
    if hold is not None and hold.ended:
        return
    until = _until(draft, event)
    if hold is not None:
        _release(draft, hold)
    elif until <= draft.now:
        return
    draft.hold = Hold(nanos=0, elapsed_s=event.duration_s or 0, until=until, ended=True)


def die(draft: Draft, hold: Hold) -> None:
    """No sign of life for too long: the call may go on, but nobody knows."""
    _release(draft, hold)


def _until(draft: Draft, event: UsageEvent) -> datetime:
    # A platform whose clock is ahead keeps no hold longer.
    until = min(event.ended_at, draft.now) + LIVES
    return until if event.hold is None else max(until, event.hold.until)


def _release(draft: Draft, hold: Hold) -> None:
    account = draft.account
    holds = account.standing.holds - 1
    exposure_nanos = account.standing.exposure_nanos - hold.nanos
    assert holds >= 0, "more holds are released than there were"
    assert exposure_nanos >= 0, "more is released than was held"
    draft.account = account.changed(
        holds=holds,
        exposure_nanos=exposure_nanos,
        holds_told=account.standing.holds_told and holds > _ROOM_AGAIN,
    )


def _tell_of_many(draft: Draft) -> None:
    account = draft.account
    if account.standing.holds_told:
        return
    draft.notify(
        NoticeKind.HOLDS_EXCEEDED,
        balance=text_from(draft.balance_nanos),
        rule="most_holds",
        fix=f"{MOST_HOLDS} open calls hold money; further ones hold none until some have ended.",
        **draft.exposed(),
    )
    draft.account = account.changed(holds_told=True)
