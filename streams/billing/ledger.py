"""The ledger: the one door through which a balance moves.

`apply` takes one account, one event, the terms in force and one instant; it gives back the new
account and all there is to announce. It reads no clock and does no I/O, so the same log gives
the same bytes.
"""

from datetime import datetime
from typing import Any, Final, assert_never

import msgspec
from msgspec.structs import asdict

from schemas.commands import OpenTenant, RechargePolicy
from schemas.ledger import Balance
from schemas.money import Money
from schemas.nanos import nanos_from, text_from
from schemas.notices import DeadLetterReason, Notice, NoticeKind
from schemas.usage import Phase
from streams.billing import alerts, charging, commands, granting, holds, pools, recharge, results
from streams.billing.account import Account
from streams.billing.booking import CommandRefusedError, Draft, RefusedError
from streams.billing.coverage_table import Coverage
from streams.billing.events import (
    CommandEvent,
    Event,
    ResultEvent,
    Tick,
    UsageEvent,
)
from streams.billing.legs import utc
from streams.billing.outcomes import Outcome, Refused, Terms
from streams.billing.results import ANSWERED_WITHIN

__all__ = ["LABELS", "Punctuality", "apply", "content", "public_balance"]

_END: Final = Phase.END

# What an event came to; the closed label set of `credits_events_total`.
LABELS: Final = (
    "charged",
    "included",
    "free",
    "corrected",
    "open",
    "applied",
    "refused",
    "credited",
    "answered",
    "ticked",
    "rejected",
)


def apply(account: Account | None, event: Event, terms: Terms, now: datetime) -> Outcome:
    """Apply one event to one account. The only way in which money moves."""
    if account is None:
        return _without_account(event, terms, now)
    draft = Draft(account, event.cause, now)
    try:
        match event:
            case UsageEvent():
                label = charging.charge(draft, event, terms)
                if event.leg and event.phase is _END:
                    holds.end(draft, event)
            case ResultEvent():
                label = results.answer(draft, event)
            case CommandEvent():
                commands.obey(draft, event, terms)
                label = "applied"
            case Tick():
                if event.hold is None:
                    _pass_time(draft, event.at, terms)
                else:
                    holds.die(draft, event.hold)
                label = "ticked"
            case _:
                assert_never(event)
        standing = account.standing
        if not (
            # Nearly every event ends here.
            draft.account.standing is standing
            and standing.quiet_above_nanos < draft.balance_nanos < standing.quiet_below_nanos
            and isinstance(event, UsageEvent)
        ):
            _look_around(draft, event, terms)
    except RefusedError as error:
        return _refused(account, event, error.refused, now)
    except CommandRefusedError as refusal:  # a name of its own: mypyc types a name once
        draft = Draft(account, event.cause, now)
        commands.refuse(draft, refusal)
        label = "refused"
    draft.check_books()
    return draft.outcome(label)


def _look_around(draft: Draft, event: Event, terms: Terms) -> None:
    """Ask for money if it is time to, and tell people what the balance has crossed."""
    recharge.consider(draft, stale=terms.stale, result_timeout_s=terms.result_timeout_s)
    watch = draft.account.standing.watch
    if (
        not watch.fall_nanos < draft.balance_nanos < watch.rise_nanos
        or draft.account.standing.exposure_nanos != draft.before.standing.exposure_nanos
        or not isinstance(event, UsageEvent)
    ):
        alerts.review(draft, terms.coverage.free)


def _without_account(event: Event, terms: Terms, now: datetime) -> Outcome:
    """Only opening makes an account; everything else about an unknown tenant is refused."""
    match event:
        case CommandEvent(command=OpenTenant() as command):
            try:
                account = commands.opened(command, _tenant_of(event), now)
                draft = Draft(account, event.cause, now)
                commands.open_with_money(draft, command)
                alerts.review(draft, terms.coverage.free)
            except CommandRefusedError as error:
                return _command_refused(event, error, now)
            draft.check_books()
            return draft.outcome("applied")
        case CommandEvent():
            unknown = CommandRefusedError(
                "unknown_tenant", "Open the tenant first: `credits tenant open`."
            )
            return _command_refused(event, unknown, now)
        case _:
            return Outcome(None, "rejected", refused=Refused(DeadLetterReason.UNKNOWN_TENANT))


def _tenant_of(event: CommandEvent) -> str:
    assert event.command.tenant_id is not None, "the door names the tenant"
    return event.command.tenant_id


def _command_refused(event: CommandEvent, error: CommandRefusedError, now: datetime) -> Outcome:
    notice = Notice(
        notice=NoticeKind.COMMAND_REFUSED,
        tenant_id=_tenant_of(event),
        at=now,
        caused_by=f"{event.cause.source}/{event.cause.id}",
        command_id=event.cause.id,
        rule=error.rule,
        fix=error.fix,
    )
    return Outcome(None, "refused", notices=(notice,))


def _refused(account: Account, event: Event, refused: Refused, now: datetime) -> Outcome:
    """Usage and results go to the dead letters; a command has its answer and is remembered."""
    if isinstance(event, CommandEvent):
        draft = Draft(account, event.cause, now)
        commands.refuse(
            draft,
            CommandRefusedError(
                refused.reason.value, "The balance would leave the range an account can hold."
            ),
        )
        return draft.outcome("refused")
    return Outcome(account, "rejected", refused=refused)


def _pass_time(draft: Draft, at: datetime, terms: Terms) -> None:
    """Everything of this account that is due at an instant."""
    granting.pass_time(draft, at)
    alerts.warn_of_expiry(draft, at)
    recharge.time_passed(draft, at, terms.result_timeout_s)


class Punctuality:
    """Whether events come too late or from the future, seen from one instant; judged before
    repeats. Commands are never late."""

    def __init__(self, now: datetime) -> None:
        self._usage_from = now - charging.LATEST
        # Older, a result's payment's row may be gone by now; from the future, it would outlive it.
        self._results_from = now - ANSWERED_WITHIN
        self._until = now + charging.FUTURE

    def judge(self, event: Event) -> DeadLetterReason | None:
        """The reason why an event is not booked; None when it is in time."""
        if isinstance(event, UsageEvent):
            at, first = event.ended_at, self._usage_from
        elif isinstance(event, ResultEvent):
            at, first = event.result.occurred_at, self._results_from
        else:
            return None
        if at < first:
            return DeadLetterReason.TOO_LATE
        return DeadLetterReason.FROM_THE_FUTURE if at > self._until else None


# Who asked, and when, may differ in a repeat; what is asked for may not.
_pack: Final = msgspec.msgpack.Encoder().encode
_NOT_CONTENT: Final = frozenset(
    {"command_id", "result_id", "source", "tenant_id", "issued_at", "issued_by"}
)


def content(event: Event) -> bytes:
    """What in an event matters for money, in one canonical form: the same id with another
    content is a conflict."""
    if isinstance(event, UsageEvent):
        return _pack(
            (
                event.kind,
                event.call_type,
                event.number_type,
                event.capability,
                event.user_country,
                event.phase,
                event.callee,
                event.started_at,
                event.duration_s,
                event.currency,
                event.corrects,
            )
        )
    if isinstance(event, CommandEvent):
        members = asdict(event.command)
        members["command"] = event.command.__struct_config__.tag
    else:
        assert isinstance(event, ResultEvent)
        members = asdict(event.result)
    kept = {
        name: _canonical(name, value) for name, value in members.items() if name not in _NOT_CONTENT
    }
    return msgspec.json.encode(kept, order="deterministic")


# Members of commands and results that are amounts, wherever they stand.
_AMOUNTS: Final = frozenset(
    {
        "opening_balance",
        "overdraft_floor",
        "trigger",
        "amount",
        "target",
        "min_amount",
        "max_amount",
        "daily_cap",
        "weekly_cap",
        "monthly_cap",
    }
)


def _canonical(name: str, value: Any) -> Any:
    """The one way to write an amount or an instant: 1.0 is 1, and an offset moves no instant."""
    if isinstance(value, datetime):
        return utc(value)
    if isinstance(value, Money | RechargePolicy):
        # Members that came later are left out while empty: an older repeat is still a repeat.
        return {inner: _canonical(inner, one) for inner, one in asdict(value).items() if one != {}}
    if name == "velocity":
        return {inner: _canonical("amount", one) for inner, one in value.items()}
    if name in _AMOUNTS and isinstance(value, str):
        return text_from(nanos_from(value))
    return value


def public_balance(account: Account, now: datetime, coverage: Coverage) -> Balance:
    """What everybody may read of an account."""
    asked = account.standing.recharging.asked
    balance_nanos = account.balance_nanos
    exposure_nanos = account.standing.exposure_nanos
    overdraft_nanos = account.overdraft_nanos
    balance = text_from(balance_nanos)
    available = text_from(balance_nanos - exposure_nanos) if exposure_nanos else balance
    return Balance(
        tenant_id=account.tenant_id,
        currency=account.currency,
        balance=balance,
        available=available,
        # The default itself, or it is written: one that only equals it is not left out.
        overdraft=text_from(overdraft_nanos) if overdraft_nanos else "0",
        seq=account.seq,
        hash=account.head.hex(),
        recharge_state=account.standing.recharging.stage,
        recharge_id=None if asked is None else asked.recharge_id,
        settings_version=account.standing.settings_version,
        policy_version=account.standing.policy.version,
        closed=account.standing.closed_at is not None,
        pools=pools.states(account, now, coverage) if account.standing.pools else [],
        as_of=now,
        exposure=text_from(exposure_nanos) if exposure_nanos else "0",
        holds=account.standing.holds,
    )
