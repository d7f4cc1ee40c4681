"""Recharge: when money is asked for, how much, and why it is not.

A state per tenant: idle → requested → cooling → idle, paused, needs_approval. An epoch is one
shortage; attempts 1, 2, … within it are tries after declines. At most one auto-recharge is
unanswered at any time, and only an answer to it leaves `requested`.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final
from uuid import UUID, uuid5

from msgspec.structs import replace

from schemas.commands import Compare, Method
from schemas.funding import Reason, RechargeRequest, Status
from schemas.nanos import NANOS, text_from
from schemas.notices import GuardAsked, NoticeKind, Withheld
from streams.billing.account import Account
from streams.billing.booking import Draft
from streams.billing.money import ceil_div, exponent_of, minor_from, rounded_up
from streams.billing.outcomes import Ask, Finding
from streams.billing.parts import (
    UNANSWERED_FOR,
    Asked,
    Attempt,
    Declines,
    Policy,
    Recharging,
    Risk,
    Sum,
    Sums,
    flat_from,
    overdue_at,
    short,
    sums_of,
)
from streams.billing.stages import Occasion, Stage, Step, step_of

# Fixed for ever: the ids of all recharges are derived under it.
RECHARGES: Final = UUID("6f1b2f3e-2f57-5a0c-9a5e-0d1c6f5b7a11")
PAUSE_AFTER_DECLINES: Final = 4
BACKOFF: Final = timedelta(hours=1)
# Decline codes after which asking again only does harm.
TERMINAL_CODES: Final = frozenset({"lost_card", "stolen_card", "fraud", "authentication_required"})
EXPIRED_CARD: Final = "expired_card"
# Labels of answers: asked again, paused unless there is another method, paused at once.
DECLINE_CLASSES: Final = ("none", "retryable", EXPIRED_CARD, "terminal")
KEPT_ATTEMPTS: Final = 15
DECLINES_PER_METHOD: Final = 15
DECLINE_DAYS: Final = 30
# Payment methods whose declines a row keeps: those a policy can name, and a few it has named.
MOST_DECLINED: Final = 8
# The least a recharge or purchase may be, in whole units; where a unit is worth a hundredth of a
# dollar, a hundred times as many.
MINIMUM_RECHARGE: Final = 50
_MINIMUM_RECHARGE: Final = {"JPY": 5_000, "KRW": 50_000, "HUF": 15_000, "TWD": 1_500}
# One request asks for at most this many times the minimum (100,000 USD), whatever a policy says.
CEILING_TIMES: Final = 2_000

# As a row holds it: an enum's member read from its class costs as much as a call.
_NEEDS_APPROVAL: Final = Stage.NEEDS_APPROVAL.value
_REQUESTED: Final = Stage.REQUESTED.value
_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
# Spend on risk classes is kept in blocks of four hours: by hour it would not fit a row.
_BLOCK: Final = timedelta(hours=4)
_BLOCKS: Final = 6
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def amount_of(ask: Ask) -> int:
    """What would be asked for; worked out only where a guard wants to know. The gap to a target may
    be small, but no request is."""
    currency = ask.account.currency
    amount_nanos = wanted(ask.policy, ask.available_nanos, currency)
    if ask.policy.method is Method.TARGET and amount_nanos > 0:
        return max(amount_nanos, minimum_recharge_nanos(currency))
    return amount_nanos


def unneeded(account: Account, since: datetime, nanos: int) -> tuple[Attempt, ...]:
    """The auto-recharges asked for at an instant or later that would not have been with that much
    more on the account, as the policy compares now."""
    le = account.standing.policy.compare is Compare.LE
    return tuple(
        one
        for one in account.standing.recharging.attempts
        if one.requested_at is not None
        and one.requested_at >= since
        and (one.short_nanos < nanos if le else one.short_nanos <= nanos)
    )


def minimum_recharge_nanos(currency: str) -> int:
    """The least a recharge or purchase may be."""
    return _MINIMUM_RECHARGE.get(currency, MINIMUM_RECHARGE) * NANOS


def ceiling_of(currency: str) -> int:
    """The most one request may ask for, in nanos."""
    return CEILING_TIMES * minimum_recharge_nanos(currency)


def decline_class(status: Status, code: str | None) -> str:
    """What a decline means for the next attempt; `none` for every other answer."""
    if status is not Status.DECLINED:
        return "none"
    if code == EXPIRED_CARD:
        return EXPIRED_CARD
    return "terminal" if code in TERMINAL_CODES else "retryable"


def recharge_id(tenant_id: str, epoch: int, attempt: int) -> str:
    """Same tenant, epoch and attempt, same id, however often we are asked."""
    return str(uuid5(RECHARGES, f"{tenant_id}/{epoch}/{attempt}"))


def attempt_of(account: Account, wanted: str) -> Attempt | None:
    """The auto-recharge of an id, when it is still known."""
    for one in reversed(account.standing.recharging.attempts):
        if recharge_id(account.tenant_id, one.epoch, one.attempt) == wanted:
            return one
    return None


def below_trigger(policy: Policy, available_nanos: int) -> bool:
    """Strictly below by default; at the trigger too when the policy compares `le`."""
    if policy.compare is Compare.LE:
        return available_nanos <= policy.trigger_nanos
    return available_nanos < policy.trigger_nanos


def wanted(policy: Policy, available_nanos: int, currency: str) -> int:
    """How much the policy asks for, in nanos, rounded up to the currency's minor unit.

    `min` raises a request; `max` clips every method but `target`.
    """
    gap_nanos = max(0, policy.trigger_nanos - available_nanos)
    match policy.method:
        case Method.FIXED:
            amount = policy.amount_nanos
        case Method.FIXED_MULTIPLE:
            amount = policy.amount_nanos * max(1, ceil_div(gap_nanos, policy.amount_nanos))
        case Method.TARGET:
            amount = policy.target_nanos - available_nanos
        case Method.GAP_PLUS_AMOUNT:
            amount = gap_nanos + policy.amount_nanos
    if amount <= 0:
        return 0  # the target is reached: nothing is missing that a minimum could raise
    if policy.min_nanos is not None:
        amount = max(amount, policy.min_nanos)
    if policy.max_nanos is not None and policy.method is not Method.TARGET:
        amount = min(amount, policy.max_nanos)
    return rounded_up(amount, currency)


def _in_flight_nanos(account: Account) -> int:
    asked = account.standing.recharging.asked
    return (asked.amount_nanos if asked else 0) + sum(
        fund.amount_nanos for fund in account.standing.funds
    )


def _cap(ask: Ask, cap_nanos: int | None, spent_nanos: int) -> Finding:
    """A cap withholds and never trims; exactly at the cap passes."""
    if cap_nanos is None:
        return _OFF
    found = spent_nanos + _in_flight_nanos(ask.account) + amount_of(ask)
    return Finding(found > cap_nanos, found, cap_nanos)


def _last_hours(ask: Ask) -> list[Sum]:
    first = (ask.now - _EPOCH) // _HOUR - 24
    return [one for one in sums_of(ask.account.standing.recharging.hours) if one.at >= first]


def _last_days(ask: Ask, days: int) -> list[Sum]:
    first = (ask.now - _EPOCH) // _DAY - days
    return [one for one in sums_of(ask.account.standing.recharging.days) if one.at >= first]


def _next_index(account: Account, now: datetime) -> int:
    """Which payment method is asked next: a new epoch begins with the first one. One that was
    declined as often as it may be is passed over; when all were, it stays with the first."""
    recharging = account.standing.recharging
    first = recharging.method_index if recharging.retry else 0
    methods = max(1, len(account.standing.payment_methods))
    for index in range(first, first + methods):
        if not _worn_out(account, index % methods, now):
            return index % methods
    return first


def _declines_of(account: Account, index: int, now: datetime) -> list[int]:
    """The days of a payment method's declines."""
    method = short(_method(account, index) or "")
    first = (now - _EPOCH) // _DAY - DECLINE_DAYS
    days = [
        day
        for one in account.standing.recharging.declines
        if one.method == method
        for day in one.days
    ]
    return [day for day in days if day >= first]


def _worn_out(account: Account, index: int, now: datetime) -> bool:
    return len(_declines_of(account, index, now)) >= DECLINES_PER_METHOD


_OFF: Final = Finding(False)


def _disabled(ask: Ask) -> Finding:
    closed_at = ask.account.standing.closed_at
    if closed_at is not None:
        return Finding(True, "closed", closed_at)
    return Finding(not ask.policy.enabled, "enabled" if ask.policy.enabled else "disabled")


def _above_trigger(ask: Ask) -> Finding:
    # Also when the target is reached exactly: nothing is missing, so nothing is asked.
    holds = not below_trigger(ask.policy, ask.available_nanos) or amount_of(ask) <= 0
    return Finding(holds, ask.available_nanos, ask.policy.trigger_nanos)


def _in_flight(ask: Ask) -> Finding:
    asked = ask.account.standing.recharging.asked
    return _OFF if asked is None else Finding(True, asked.recharge_id)


def _stale(ask: Ask) -> Finding:
    return Finding(ask.stale)


def _stage(stage: Stage) -> Callable[[Ask], Finding]:
    def guard(ask: Ask) -> Finding:
        recharging = ask.account.standing.recharging
        return Finding(recharging.stage == stage, recharging.stage, recharging.until)

    return guard


def _exhausted(ask: Ask) -> Finding:
    found = len(_declines_of(ask.account, _next_index(ask.account, ask.now), ask.now))
    return Finding(found >= DECLINES_PER_METHOD, found, DECLINES_PER_METHOD)


def _too_often(ask: Ask) -> Finding:
    settled = sum(one.count for one in _last_hours(ask))
    found = settled + len(ask.account.standing.funds)
    return Finding(found >= ask.policy.max_per_day, found, ask.policy.max_per_day)


def _daily(ask: Ask) -> Finding:
    cap_nanos = ask.policy.daily_cap_nanos
    return _cap(ask, cap_nanos, sum(one.nanos for one in _last_hours(ask)))


def _weekly(ask: Ask) -> Finding:
    cap_nanos = ask.policy.weekly_cap_nanos
    return _cap(ask, cap_nanos, sum(one.nanos for one in _last_days(ask, 7)))


def _monthly(ask: Ask) -> Finding:
    cap_nanos = ask.policy.monthly_cap_nanos
    return _cap(ask, cap_nanos, sum(one.nanos for one in _last_days(ask, 30)))


def _velocity(ask: Ask) -> Finding:
    """Above its limit a risk class of destinations looks like fraud: a person has to say that it
    is none. What was approved stays so until the epoch ends."""
    recharging = ask.account.standing.recharging
    if recharging.approved:
        return Finding(False, "approved by a person")
    worst = _OFF
    first = (ask.now - _EPOCH) // _BLOCK - _BLOCKS
    for name, limit_nanos in ask.policy.velocity:
        spent = _spent_on(recharging, name, first)
        if spent > limit_nanos:
            return Finding(True, spent, limit_nanos)
        worst = Finding(False, spent, limit_nanos)
    if recharging.stage == Stage.NEEDS_APPROVAL:
        return Finding(True, worst.found, worst.limit)
    return worst


def _above_max(ask: Ask) -> Finding:
    ceiling_nanos = ceiling_of(ask.account.currency)
    amount_nanos = amount_of(ask)
    return Finding(amount_nanos > ceiling_nanos, amount_nanos, ceiling_nanos)


# Asked in this order; the first that holds is the reason.
GUARDS: Final[tuple[tuple[Withheld, Callable[[Ask], Finding]], ...]] = (
    (Withheld.DISABLED, _disabled),
    (Withheld.ABOVE_TRIGGER, _above_trigger),
    (Withheld.IN_FLIGHT, _in_flight),
    (Withheld.STALE, _stale),
    (Withheld.PAUSED, _stage(Stage.PAUSED)),
    (Withheld.COOLING, _stage(Stage.COOLING)),
    (Withheld.ATTEMPTS_EXHAUSTED, _exhausted),
    (Withheld.DAILY_COUNT, _too_often),
    (Withheld.DAILY_AMOUNT, _daily),
    (Withheld.WEEKLY_AMOUNT, _weekly),
    (Withheld.MONTHLY_AMOUNT, _monthly),
    (Withheld.VELOCITY, _velocity),
    (Withheld.ABOVE_MAX, _above_max),
)
# Guards whose findings are amounts.
_AMOUNTS: Final = frozenset(
    {
        Withheld.ABOVE_TRIGGER,
        Withheld.DAILY_AMOUNT,
        Withheld.WEEKLY_AMOUNT,
        Withheld.MONTHLY_AMOUNT,
        Withheld.VELOCITY,
        Withheld.ABOVE_MAX,
    }
)


def _told(guard: Withheld, finding: Finding) -> GuardAsked:
    """What a guard answered, as a notice carries it."""
    return GuardAsked(
        guard=guard,
        holds=finding.holds,
        found=_text(finding.found, amount=guard in _AMOUNTS),
        limit=_text(finding.limit, amount=guard in _AMOUNTS),
    )


def _text(value: object, *, amount: bool) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and amount:
        return text_from(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _opens_at(ask: Ask, reason: Withheld) -> datetime | None:
    """When the oldest hour or day leaves the window a guard looks at: then it is asked again,
    whether or not an event comes. None when time alone does not change its mind."""
    match reason:
        case Withheld.ATTEMPTS_EXHAUSTED:
            unit, length = _DAY, DECLINE_DAYS
            methods = range(max(1, len(ask.account.standing.payment_methods)))
            counted = [day for at in methods for day in _declines_of(ask.account, at, ask.now)]
        case Withheld.DAILY_COUNT | Withheld.DAILY_AMOUNT:
            unit, length = _HOUR, 24
            counted = [one.at for one in _last_hours(ask)]
        case Withheld.WEEKLY_AMOUNT | Withheld.MONTHLY_AMOUNT:
            unit, length = _DAY, 7 if reason is Withheld.WEEKLY_AMOUNT else 30
            counted = [one.at for one in _last_days(ask, length)]
        case _:
            return None
    return _EPOCH + (min(counted) + length + 1) * unit if counted else None


def consider(draft: Draft, *, stale: bool, result_timeout_s: int) -> None:
    """Ask for money if it is time to, after any event that may have changed the answer."""
    account = draft.account
    policy = account.standing.policy
    recharging = account.standing.recharging
    available_nanos = draft.balance_nanos - account.standing.exposure_nanos
    if not below_trigger(policy, available_nanos):
        # Money that is there again ends an epoch between tries.
        stage = recharging.stage
        if (
            recharging.withheld is not None
            or recharging.retry
            or recharging.approved
            or stage == _NEEDS_APPROVAL
            or (stage == _REQUESTED and not recharging.covered and _money_came(draft))
        ):
            _covered(draft)
        return
    if (
        recharging.withheld is Withheld.IN_FLIGHT
        and recharging.asked is not None
        and policy.enabled
        and account.standing.closed_at is None
    ):
        return  # told already; the guards would say it again
    ask = Ask(account, policy, available_nanos, draft.now, stale)
    findings: list[tuple[Withheld, Finding]] = []
    for reason, guard in GUARDS:
        finding = guard(ask)
        findings.append((reason, finding))
        if finding.holds:
            _withhold(draft, ask, reason, findings)
            return
    _request(draft, amount_of(ask), findings, result_timeout_s)


def _money_came(draft: Draft) -> bool:
    """Whether there is more money than when the request in flight was made: what an open call
    sets free is none."""
    asked = draft.account.standing.recharging.asked
    return asked is not None and draft.balance_nanos > asked.balance_nanos


def _covered(draft: Draft) -> None:
    """The balance is there again: an epoch between two tries has ended, or ends with a decline of
    the try in flight, and nothing is missing that a person would have to approve."""
    recharging = draft.account.standing.recharging
    step = step_of(recharging.stage, Occasion.COVERED)
    free = step is Step.FREE or (step is Step.END and recharging.retry)
    _move(
        draft,
        withheld=None,
        retry=False,
        approved=False,
        stage=Stage.IDLE if free else recharging.stage,
        until=None if free else recharging.until,
        covered=recharging.covered or _money_came(draft),
    )


def _withhold(
    draft: Draft, ask: Ask, reason: Withheld, findings: list[tuple[Withheld, Finding]]
) -> None:
    """Tell why nothing is asked, when it is another reason than before."""
    recharging = draft.account.standing.recharging
    if reason is not recharging.withheld:
        asked = [_told(guard, finding) for guard, finding in findings]
        if reason is Withheld.VELOCITY:
            step = step_of(recharging.stage, Occasion.SUSPECT)
            if step is Step.HALT:
                _move(draft, stage=Stage.NEEDS_APPROVAL)
                draft.notify(
                    NoticeKind.RECHARGE_NEEDS_APPROVAL,
                    amount=text_from(amount_of(ask)),
                    balance=text_from(draft.balance_nanos),
                    **draft.exposed(),
                )
        draft.withheld = reason
        draft.notify(
            NoticeKind.RECHARGE_WITHHELD,
            withheld=reason,
            balance=text_from(draft.balance_nanos),
            retry_at=_opens_at(ask, reason) or recharging.until,
            guards=asked,
            policy_version=ask.policy.version,
            **draft.exposed(),
        )
        _move(draft, withheld=reason)
    opens_at = _opens_at(ask, reason)
    if opens_at != draft.account.standing.recharging.opens_at:
        _move(draft, opens_at=opens_at)


def _move(draft: Draft, **changes: object) -> Recharging:
    if "withheld" in changes:
        changes.setdefault("opens_at", None)
    recharging = replace(draft.account.standing.recharging, **changes)
    draft.account = draft.account.changed(recharging=recharging)
    return recharging


def _method(account: Account, index: int) -> str | None:
    methods = account.standing.payment_methods
    return methods[index % len(methods)] if methods else None


def _request(
    draft: Draft,
    amount_nanos: int,
    findings: list[tuple[Withheld, Finding]],
    result_timeout_s: int,
) -> None:
    account = draft.account
    recharging = account.standing.recharging
    step = step_of(recharging.stage, Occasion.SHORT)
    assert step is Step.REQUEST
    again = recharging.retry
    epoch = recharging.epoch if again else recharging.epoch + 1
    attempt = recharging.attempt + 1 if again else 1
    index = _next_index(account, draft.now)
    asked = Asked(
        recharge_id=recharge_id(account.tenant_id, epoch, attempt),
        amount_nanos=amount_nanos,
        epoch=epoch,
        attempt=attempt,
        method=_method(account, index),
        policy_version=account.standing.policy.version,
        reason=_reason(recharging),
        trigger_nanos=account.standing.policy.trigger_nanos,
        balance_nanos=draft.balance_nanos,
        exposure_nanos=account.standing.exposure_nanos,
        caused_by=draft.caused_by,
        requested_at=draft.now,
        expires_at=draft.now + timedelta(seconds=result_timeout_s),
    )
    short_nanos = account.standing.policy.trigger_nanos - draft.available_nanos
    made = Attempt(epoch, attempt, amount_nanos, draft.now, short_nanos)
    _move(
        draft,
        stage=Stage.REQUESTED,
        epoch=epoch,
        attempt=attempt,
        asked=asked,
        until=None,
        retry=False,
        method_index=index,
        rounds=recharging.rounds if again else 0,
        withheld=None,
        covered=False,
        attempts=(*recharging.attempts[-(KEPT_ATTEMPTS - 1) :], made),
    )
    publish(draft, asked)
    draft.notify(
        NoticeKind.RECHARGE_REQUESTED,
        recharge_id=asked.recharge_id,
        amount=text_from(amount_nanos),
        balance=text_from(draft.balance_nanos),
        guards=[_told(guard, finding) for guard, finding in findings],
        policy_version=account.standing.policy.version,
        epoch=epoch,
        attempt=attempt,
        payment_method=asked.method,
        reason=asked.reason,
        **draft.exposed(),
    )


def _reason(recharging: Recharging) -> Reason:
    if recharging.retry:
        return Reason.RETRY
    return Reason.APPROVED if recharging.approved else Reason.BELOW_TRIGGER


def publish(draft: Draft, asked: Asked) -> None:
    """Put a request into the outcome; published again it differs in `expires_at` alone."""
    account = draft.account
    draft.requests += (
        RechargeRequest(
            recharge_id=asked.recharge_id,
            tenant_id=account.tenant_id,
            epoch=asked.epoch,
            attempt=asked.attempt,
            amount=text_from(asked.amount_nanos),
            amount_minor=minor_from(asked.amount_nanos, account.currency),
            exponent=exponent_of(account.currency),
            currency=account.currency,
            trigger=None if asked.trigger_nanos is None else text_from(asked.trigger_nanos),
            balance=text_from(asked.balance_nanos),
            available=text_from(asked.balance_nanos - asked.exposure_nanos),
            exposure=text_from(asked.exposure_nanos),
            reason=asked.reason,
            payment_method=asked.method,
            requested_at=asked.requested_at,
            expires_at=asked.expires_at,
            policy_version=asked.policy_version,
            caused_by=asked.caused_by,
        ),
    )


def answered(draft: Draft, status: Status, decline_code: str | None) -> None:
    """The request in flight was answered."""
    recharging = draft.account.standing.recharging
    assert recharging.asked is not None
    match step_of(recharging.stage, Occasion(status.value)):
        case Step.COOL:
            _cool(draft, succeeded=status is Status.SUCCEEDED)
        case Step.DECLINE:
            _declined(draft, decline_code)
        case Step.WAIT:
            _move(draft, asked=replace(recharging.asked, needs_action=True))
        case step:
            assert step is Step.STAY


def late_success(draft: Draft) -> None:
    """An earlier attempt was paid after all; a request in flight stays in flight."""
    if step_of(draft.account.standing.recharging.stage, Occasion.EARLIER_SUCCEEDED) is Step.COOL:
        _cool(draft, succeeded=True)
    else:
        _move(draft, declines_in_row=0)


def paid_by_hand(draft: Draft) -> None:
    """Funding by hand succeeded: whatever made the card fail is over."""
    free = step_of(draft.account.standing.recharging.stage, Occasion.PAID_BY_HAND) is Step.FREE
    _free(draft, free=free)


def new_method(draft: Draft) -> None:
    """A payment method was added: what made the old ones fail no longer matters."""
    free = step_of(draft.account.standing.recharging.stage, Occasion.NEW_METHOD) is Step.FREE
    _free(draft, free=free, method_index=0)


def _free(draft: Draft, *, free: bool, **changes: object) -> None:
    stage = Stage.IDLE if free else draft.account.standing.recharging.stage
    _move(draft, declines_in_row=0, stage=stage, withheld=None, **changes)


def approve(draft: Draft) -> bool:
    """A person says that it is no fraud; what is missing is asked for, in this epoch without
    looking at velocity again. False when nothing waits for approval."""
    if step_of(draft.account.standing.recharging.stage, Occasion.APPROVE) is Step.REFUSE:
        return False
    _move(draft, stage=Stage.IDLE, approved=True, withheld=None)
    return True


def deny(draft: Draft) -> bool:
    """A person says no: nothing is asked until money comes or a method is added. False when
    nothing waits for approval."""
    if step_of(draft.account.standing.recharging.stage, Occasion.DENY) is Step.REFUSE:
        return False
    _move(draft, stage=Stage.PAUSED, retry=False, withheld=None)
    draft.notify(NoticeKind.RECHARGE_PAUSED, rule="denied")
    return True


def resolve(draft: Draft, *, paid: bool) -> None:
    """A person has decided what became of the request in flight: the epoch is over."""
    step = step_of(draft.account.standing.recharging.stage, Occasion.RESOLVE)
    assert step is Step.COOL
    _cool(draft, succeeded=paid)


def spent(draft: Draft, risk_class: str, amount_nanos: int) -> None:
    """Count money charged for a destination of a risk class, for `velocity`: for a day, in whole
    blocks of four hours, the oldest in full, and only for classes that have a limit."""
    limited = [name for name, _ in draft.account.standing.policy.velocity]
    if risk_class not in limited:
        return
    block = (draft.now - _EPOCH) // _BLOCK
    risks = draft.account.standing.recharging.risks
    found = next((one for one in risks if one.name == risk_class), Risk(risk_class, ()))
    # How often money was spent nobody asks.
    blocks = _added(found.blocks, block, block - _BLOCKS, 0, amount_nanos)
    others = tuple(one for one in risks if one.name != risk_class and one.name in limited)
    _move(draft, risks=(*others, Risk(risk_class, blocks)))


def _spent_on(recharging: Recharging, risk_class: str, first: int) -> int:
    for risk in recharging.risks:
        if risk.name == risk_class:
            return sum(one.nanos for one in sums_of(risk.blocks) if one.at >= first)
    return 0


def _cool(draft: Draft, *, succeeded: bool) -> None:
    recharging = draft.account.standing.recharging
    _move(
        draft,
        stage=Stage.COOLING,
        asked=None,
        until=draft.now + timedelta(seconds=draft.account.standing.policy.cooldown_s),
        retry=False,
        method_index=0,
        rounds=0,
        declines_in_row=0 if succeeded else recharging.declines_in_row,
        withheld=None,
        approved=False,
    )


def _declined(draft: Draft, code: str | None) -> None:
    """The next payment method is asked at once; when all have declined, later; or not at all.
    Where money has come meanwhile the epoch is over, and what is missing now begins another."""
    account = draft.account
    recharging = account.standing.recharging
    assert recharging.asked is not None
    in_row = recharging.declines_in_row + 1
    methods = max(1, len(account.standing.payment_methods))
    following = (
        index
        for index in range(recharging.method_index + 1, methods)
        if not _worn_out(account, index, draft.now)
    )
    another = next(following, None)
    terminal = code in TERMINAL_CODES or (code == EXPIRED_CARD and methods == 1)
    _move(
        draft,
        asked=None,
        declines_in_row=in_row,
        declines=_count_decline(account, recharging.asked.method or "", draft.now),
        withheld=None,
    )
    if terminal or in_row >= PAUSE_AFTER_DECLINES:
        _move(draft, stage=Stage.PAUSED, until=None, retry=False, approved=False)
        draft.notify(
            NoticeKind.RECHARGE_PAUSED,
            recharge_id=recharging.asked.recharge_id,
            decline_code=code,
            rule="terminal_decline" if terminal else "declines_in_row",
        )
    elif recharging.covered:
        _move(draft, stage=Stage.IDLE, retry=False, method_index=0, approved=False)
    elif another is not None:
        # Idle with `retry` set: the attempt that follows belongs to the same epoch.
        _move(draft, stage=Stage.IDLE, retry=True, method_index=another)
    else:
        rounds = recharging.rounds + 1
        until = draft.now + BACKOFF * 2 ** (rounds - 1)
        _move(draft, stage=Stage.COOLING, until=until, retry=True, method_index=0, rounds=rounds)


def _count_decline(account: Account, method: str, now: datetime) -> tuple[Declines, ...]:
    """Declines with one more. Each method's are kept for their days and up to the ceiling; what
    is not among the tenant's methods any more goes first, the longest ago of it."""
    day = (now - _EPOCH) // _DAY
    named = {short(one) for one in account.standing.payment_methods}
    changed = short(method)
    kept: list[Declines] = []
    days: list[int] = []
    for one in account.standing.recharging.declines:
        last = [at for at in one.days if at >= day - DECLINE_DAYS]
        if one.method == changed:
            days = last
        elif last:
            kept.append(_declines(one.method, last))
    if len(kept) >= MOST_DECLINED:
        kept.remove(next(one for one in kept if one.method not in named))
    kept.append(_declines(changed, [*days, day]))
    return tuple(kept)


def _declines(method: bytes, days: list[int]) -> Declines:
    days = days[-DECLINES_PER_METHOD:]
    return Declines(method, (days[0], *(later - day for day, later in pairwise(days))))


def count_money(draft: Draft, amount_nanos: int, *, again: bool = False) -> None:
    """Remember what was recharged, for the caps: by hour for a day, by day for a month.

    `again`: more of a payment that is counted already, such as its second partial capture.
    """
    recharging = draft.account.standing.recharging
    count = 0 if again else 1
    hour = (draft.now - _EPOCH) // _HOUR
    day = (draft.now - _EPOCH) // _DAY
    _move(
        draft,
        hours=_added(recharging.hours, hour, hour - 24, count, amount_nanos),
        days=_added(recharging.days, day, day - 30, count, amount_nanos),
    )


def _added(sums: Sums, at: int, first: int, count: int, nanos: int) -> Sums:
    kept = [one for one in sums_of(sums) if one.at >= first]
    if kept and kept[-1].at == at:
        kept[-1] = Sum(at, kept[-1].count + count, kept[-1].nanos + nanos)
    else:
        kept.append(Sum(at, count, nanos))
    return flat_from(kept)


def time_passed(draft: Draft, at: datetime, result_timeout_s: int) -> None:
    """Ends of cooldowns and back-offs, windows of caps, requests without an answer."""
    recharging = draft.account.standing.recharging
    if recharging.until is not None and recharging.until <= at:
        assert step_of(recharging.stage, Occasion.TIME_UP) is Step.FREE
        recharging = _move(draft, stage=Stage.IDLE, until=None, withheld=None)
    if recharging.opens_at is not None and recharging.opens_at <= at:
        # A cap's window has moved on; `consider`, which follows, asks the guards again.
        recharging = _move(draft, opens_at=None)
    if draft.account.standing.closed_at is not None:
        return
    asked = recharging.asked
    if asked is not None and _is_overdue(asked, at):
        assert step_of(recharging.stage, Occasion.OVERDUE) is Step.PUBLISH
        renewed = _renewed(draft, asked, result_timeout_s)
        _move(draft, asked=renewed)
    if any(_is_overdue(fund, at) for fund in draft.account.standing.funds):
        draft.account = draft.account.changed(
            funds=tuple(
                _renewed(draft, fund, result_timeout_s) if _is_overdue(fund, at) else fund
                for fund in draft.account.standing.funds
            ),
        )


def _is_overdue(asked: Asked, at: datetime) -> bool:
    due = overdue_at(asked)
    return due is not None and due <= at


def _renewed(draft: Draft, asked: Asked, result_timeout_s: int) -> Asked:
    """The same request again, with the same id: a new one might be paid beside the first. After a
    day a person has to decide, and is told so once."""
    if not asked.overdue:
        draft.notify(
            NoticeKind.RECHARGE_OVERDUE,
            recharge_id=asked.recharge_id,
            amount=text_from(asked.amount_nanos),
        )
    if draft.now - asked.requested_at >= UNANSWERED_FOR:
        draft.notify(
            NoticeKind.RECHARGE_UNRESOLVED,
            recharge_id=asked.recharge_id,
            amount=text_from(asked.amount_nanos),
            fix="Look it up at the payment service, then say with `credits recharge resolve` "
            "whether it was paid.",
        )
        return replace(asked, overdue=True, unresolved=True)
    expires_at = draft.now + timedelta(seconds=result_timeout_s)
    renewed = replace(asked, expires_at=expires_at, overdue=True)
    publish(draft, renewed)
    return renewed
