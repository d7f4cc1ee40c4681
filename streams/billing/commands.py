"""Commands: what administrators and operators ask; applied whole or refused with rule and fix."""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Final, TypeVar, assert_never

from msgspec.structs import replace

from schemas.commands import (
    Adjustment,
    AnyCommand,
    Approve,
    BookPayment,
    CloseTenant,
    Deny,
    Fund,
    Grant,
    Licences,
    Method,
    OpenTenant,
    RechargePolicy,
    ResolveRecharge,
    Settings,
    TariffAssignment,
    Void,
)
from schemas.funding import Reason, Status
from schemas.ledger import EntryKind
from schemas.money import Money
from schemas.nanos import MAX_EVENT_NANOS, NANOS, nanos_from, text_from
from schemas.notices import NoticeKind
from streams.billing import alerts, granting, pools, recharge, results
from streams.billing.account import Account, account_from
from streams.billing.booking import CommandRefusedError, Draft
from streams.billing.charging import FORMER_KEPT, LATEST
from streams.billing.coverage_table import Coverage
from streams.billing.events import CommandEvent
from streams.billing.legs import utc
from streams.billing.money import CURRENCIES, exponent_of, rounded_up
from streams.billing.outcomes import Terms
from streams.billing.parts import (
    UNANSWERED_FOR,
    AccountRow,
    Asked,
    Assignment,
    LicenceCount,
    Licensed,
    Payment,
    Period,
    Policy,
    counts_from,
    used_from,
)
from streams.billing.recharge import ceiling_of, minimum_recharge_nanos
from streams.billing.results import PAYMENT_KEPT
from streams.billing.windows import zone_of

MINIMUM_TRIGGER: Final = 5
MOST_OPEN_FUNDS: Final = 8
# A row holds the decks of two months; nobody changes them daily.
MOST_ASSIGNMENTS: Final = 12
# Plans, by country where they count by country, changes of each, and of all: a row stays small.
MOST_PLANS: Final = 24
MOST_LICENCE_CHANGES: Final = 12
MOST_CHANGES_IN_ALL: Final = 28
# The length of what policies name, in bytes: it stands in the row as long as the policy does.
MOST_METHOD_BYTES: Final = 48
MOST_CLASS_BYTES: Final = 20

_Change = TypeVar("_Change", Assignment, LicenceCount)


def obey(draft: Draft, event: CommandEvent, terms: Terms) -> None:
    """Apply a command to an open draft. Raises CommandRefusedError; then the draft is void."""
    command: AnyCommand = event.command
    grant_id: str | None = None
    match command:
        case OpenTenant():
            _reopen(draft, command)
        case CloseTenant():
            _close(draft)
        case Settings():
            _settings(draft, command)
        case Fund():
            _fund(draft, command, terms.result_timeout_s)
        case BookPayment():
            _book_payment(draft, command, event.payment)
        case Adjustment():
            _adjust(draft, command)
        case Grant():
            _not_closed(draft)
            amount_nanos = _money(command.amount, draft.account)
            if amount_nanos <= 0:
                raise CommandRefusedError("amount_positive", "Give an amount above zero.")
            grant_id = granting.grant(draft, command, amount_nanos)
        case Void():
            grant_id = granting.void(draft, command)
        case TariffAssignment():
            _assign_deck(draft, command)
        case Licences():
            _licences(draft, command, terms.coverage)
        case Approve():
            _approve(draft)
        case Deny():
            _deny(draft)
        case ResolveRecharge():
            _resolve(draft, command, event.payment)
        case _:
            assert_never(command)
    draft.notify(
        NoticeKind.COMMAND_APPLIED,
        command_id=draft.cause.id,
        version=draft.account.standing.settings_version,
        balance=text_from(draft.account.balance_nanos),
        grant_id=grant_id,
    )
    if isinstance(command, Settings):
        draft.notify(
            NoticeKind.SETTINGS_CHANGED,
            version=draft.account.standing.settings_version,
            policy_version=draft.account.standing.policy.version,
        )
    elif isinstance(command, TariffAssignment):
        draft.notify(
            NoticeKind.DECK_CHANGED,
            deck=command.deck,
            effective_from=utc(command.effective_from or draft.now),
        )


def opened(command: OpenTenant, tenant_id: str, now: datetime) -> Account:
    """The account an opening makes, before any money. Raises CommandRefusedError."""
    if command.currency not in CURRENCIES:
        raise CommandRefusedError(
            "unknown_currency", f"{command.currency} is no ISO 4217 code in use; try USD or EUR."
        )
    try:
        zone_of(command.time_zone)
    except ValueError as error:
        raise CommandRefusedError("time_zone", f"{error}.") from None
    billing_from = now if command.billing_from is None else utc(command.billing_from)
    row = AccountRow(
        tenant_id=tenant_id,
        currency=command.currency,
        opened_at=now,
        billing_from=billing_from,
        time_zone=command.time_zone,
    )
    return account_from(row)


def open_with_money(draft: Draft, command: OpenTenant) -> None:
    """Book the opening balance, if there is one, and answer."""
    if command.opening_balance is not None:
        amount_nanos = nanos_from(command.opening_balance)
        if not 0 <= amount_nanos <= MAX_EVENT_NANOS:
            raise CommandRefusedError(
                "opening_balance", "An opening balance is zero or more, up to 999999999."
            )
        if amount_nanos:
            draft.credit(EntryKind.GRANT, amount_nanos, details={"reason": "opening balance"})
    draft.notify(
        NoticeKind.COMMAND_APPLIED,
        command_id=draft.cause.id,
        version=0,
        balance=text_from(draft.account.balance_nanos),
    )


def refuse(draft: Draft, refused: CommandRefusedError) -> None:
    """The one notice a refused command gets."""
    draft.notify(
        NoticeKind.COMMAND_REFUSED,
        command_id=draft.cause.id,
        rule=refused.rule,
        fix=refused.fix,
        version=draft.account.standing.settings_version,
    )


def _reopen(draft: Draft, command: OpenTenant) -> None:
    account = draft.account
    if account.standing.closed_at is None:
        raise CommandRefusedError("already_open", f"{account.tenant_id} is open already.")
    if command.currency != account.currency:
        raise CommandRefusedError(
            "currency_fixed",
            f"The currency is {account.currency} for ever; open another tenant for "
            f"{command.currency}.",
        )
    if command.opening_balance is not None and nanos_from(command.opening_balance):
        raise CommandRefusedError(
            "opening_balance", "A re-opened account keeps its balance; add funds instead."
        )
    billing_from = draft.now if command.billing_from is None else utc(command.billing_from)
    # Usage of before the closing may still come: it is billed as if nothing had been closed.
    kept = tuple(one for one in account.standing.former if one.until > draft.now - FORMER_KEPT)
    former = (*kept, Period(account.standing.billing_from, account.standing.closed_at))
    draft.account = account.changed(closed_at=None, billing_from=billing_from, former=former)


def _close(draft: Draft) -> None:
    if draft.account.standing.closed_at is not None:
        raise CommandRefusedError("already_closed", "The account is closed already.")
    draft.account = draft.account.changed(closed_at=draft.now)


def _settings(draft: Draft, command: Settings) -> None:
    account = draft.account
    if command.expected_version != account.standing.settings_version:
        raise CommandRefusedError(
            "version_conflict",
            f"The settings are at version {account.standing.settings_version}, changed since you "
            f"read version {command.expected_version}; read them again and repeat your change.",
        )
    changes: dict[str, object] = {"settings_version": account.standing.settings_version + 1}
    recharging = account.standing.recharging
    if command.policy is not None:
        changes["policy"] = _policy(command.policy, account)
        recharging = replace(recharging, withheld=None)
    if command.payment_methods is not None:
        changes["payment_methods"] = _payment_methods(command.payment_methods)
    if command.overdraft_floor is not None:
        floor_nanos = nanos_from(command.overdraft_floor)
        if floor_nanos < 0:
            raise CommandRefusedError("overdraft_floor", "The overdraft floor is zero or more.")
        changes["overdraft_floor_nanos"] = floor_nanos
    if command.alert_levels is not None:
        if len(set(command.alert_levels)) < len(command.alert_levels):
            raise CommandRefusedError("alert_levels", "Name every alert level once.")
        changes["alert_levels"] = tuple(sorted(command.alert_levels, reverse=True))
    draft.account = account.changed(recharging=recharging, **changes)
    if draft.account.standing.alert_levels != account.standing.alert_levels:
        alerts.arm_levels(draft)
    if set(draft.account.standing.payment_methods) - set(account.standing.payment_methods):
        recharge.new_method(draft)


def _payment_methods(references: list[str]) -> tuple[str, ...]:
    if not all(reference.strip() for reference in references):
        raise CommandRefusedError("payment_methods", "A payment method's reference is not empty.")
    if any(len(reference.encode()) > MOST_METHOD_BYTES for reference in references):
        raise CommandRefusedError(
            "payment_methods",
            f"A payment method's reference takes at most {MOST_METHOD_BYTES} bytes.",
        )
    if len(set(references)) < len(references):
        raise CommandRefusedError(
            "payment_methods", "Name every payment method once, in the order to try them."
        )
    return tuple(references)


def _policy(wire: RechargePolicy, account: Account) -> Policy:
    """The policy in nanos. Raises CommandRefusedError when it makes no sense."""
    currency = account.currency
    trigger_nanos = nanos_from(wire.trigger)
    policy = Policy(
        version=account.standing.policy.version + 1,
        enabled=wire.enabled,
        trigger_nanos=trigger_nanos,
        compare=wire.compare,
        method=wire.method,
        amount_nanos=_nanos(wire.amount) or 0,
        target_nanos=_nanos(wire.target) or 0,
        min_nanos=_nanos(wire.min_amount),
        max_nanos=_nanos(wire.max_amount),
        daily_cap_nanos=_nanos(wire.daily_cap),
        weekly_cap_nanos=_nanos(wire.weekly_cap),
        monthly_cap_nanos=_nanos(wire.monthly_cap),
        max_per_day=wire.max_per_day,
        cooldown_s=wire.cooldown_s,
        velocity=tuple(sorted((name, nanos_from(text)) for name, text in wire.velocity.items())),
    )
    for name, nanos in (
        ("trigger", trigger_nanos),
        ("amount", policy.amount_nanos),
        ("target", policy.target_nanos),
        ("min_amount", policy.min_nanos),
        ("max_amount", policy.max_nanos),
        ("daily_cap", policy.daily_cap_nanos),
        ("weekly_cap", policy.weekly_cap_nanos),
        ("monthly_cap", policy.monthly_cap_nanos),
        *(("velocity", limit_nanos) for _, limit_nanos in policy.velocity),
    ):
        if nanos is not None and nanos < 0:
            raise CommandRefusedError(name, f"{name} must not be negative.")
    if any(len(name.encode()) > MOST_CLASS_BYTES for name, _ in policy.velocity):
        raise CommandRefusedError(
            "velocity", f"The name of a risk class takes at most {MOST_CLASS_BYTES} bytes."
        )
    if not policy.enabled:
        return policy
    if trigger_nanos < MINIMUM_TRIGGER * NANOS:
        raise CommandRefusedError(
            "trigger_minimum",
            f"Trigger must be at least {shown(MINIMUM_TRIGGER * NANOS, currency)}.",
        )
    minimum_nanos = minimum_recharge_nanos(currency)
    ceiling_nanos = ceiling_of(currency)
    if policy.min_nanos is not None:
        if policy.max_nanos is not None and policy.min_nanos > policy.max_nanos:
            raise CommandRefusedError("min_above_max", "min_amount must not be above max_amount.")
        if policy.min_nanos > ceiling_nanos:
            raise CommandRefusedError(
                "amount_maximum", f"min_amount must be at most {shown(ceiling_nanos, currency)}."
            )
    if policy.method is Method.TARGET:
        if policy.target_nanos < trigger_nanos:
            raise CommandRefusedError(
                "target_below_trigger",
                f"The target must not be below the trigger ({shown(trigger_nanos, currency)}).",
            )
        return policy
    if policy.amount_nanos < minimum_nanos:
        raise CommandRefusedError(
            "amount_minimum",
            f"Recharge amount must be at least {shown(minimum_nanos, currency)}.",
        )
    if policy.amount_nanos > ceiling_nanos:
        raise CommandRefusedError(
            "amount_maximum",
            f"Recharge amount must be at most {shown(ceiling_nanos, currency)}.",
        )
    if policy.max_nanos is not None and policy.max_nanos < minimum_nanos:
        raise CommandRefusedError(
            "amount_minimum", f"max_amount must be at least {shown(minimum_nanos, currency)}."
        )
    return policy


def _nanos(text: str | None) -> int | None:
    return None if text is None else nanos_from(text)


def shown(nanos: int, currency: str) -> str:
    """An amount as a sentence shows it: at least the currency's decimals, no thousands."""
    text = text_from(nanos)
    units, _, decimals = text.partition(".")
    wanted = exponent_of(currency)
    if len(decimals) < wanted:
        decimals = decimals.ljust(wanted, "0")
    return f"{units}.{decimals} {currency}" if decimals else f"{units} {currency}"


def _money(money: Money, account: Account) -> int:
    if money.currency != account.currency:
        raise CommandRefusedError(
            "currency_mismatch",
            f"The account is kept in {account.currency}; give the amount in {account.currency}.",
        )
    nanos = nanos_from(money.amount)
    if abs(nanos) > MAX_EVENT_NANOS:
        raise CommandRefusedError("amount_maximum", "One command moves at most 999999999.")
    return nanos


def _fund(draft: Draft, command: Fund, result_timeout_s: int) -> None:
    account = draft.account
    if account.standing.closed_at is not None:
        raise CommandRefusedError("closed", "The account is closed; open it again first.")
    amount_nanos = _money(command.amount, account)
    minimum_nanos = minimum_recharge_nanos(account.currency)
    if amount_nanos < minimum_nanos:
        raise CommandRefusedError(
            "amount_minimum", f"Add at least {shown(minimum_nanos, account.currency)}."
        )
    ceiling_nanos = ceiling_of(account.currency)
    if amount_nanos > ceiling_nanos:
        raise CommandRefusedError(
            "amount_maximum", f"Add at most {shown(ceiling_nanos, account.currency)} at a time."
        )
    if len(account.standing.funds) >= MOST_OPEN_FUNDS:
        raise CommandRefusedError(
            "too_many_open",
            f"{MOST_OPEN_FUNDS} fundings wait for an answer; wait for one of them.",
        )
    methods = account.standing.payment_methods
    asked = Asked(
        recharge_id=draft.cause.id,
        amount_nanos=rounded_up(amount_nanos, account.currency),
        method=command.payment_method or (methods[0] if methods else None),
        policy_version=account.standing.policy.version,
        reason=Reason.FUND,
        balance_nanos=account.balance_nanos,
        exposure_nanos=account.standing.exposure_nanos,
        caused_by=draft.caused_by,
        requested_at=draft.now,
        expires_at=draft.now + timedelta(seconds=result_timeout_s),
    )
    draft.account = account.changed(funds=(*account.standing.funds, asked))
    recharge.publish(draft, asked)


def _book_payment(draft: Draft, command: BookPayment, payment: Payment | None) -> None:
    account = draft.account
    amount_nanos = _money(command.amount, account)
    if amount_nanos <= 0:
        raise CommandRefusedError("amount_positive", "Give an amount above zero.")
    booked = {} if payment is None else payment.booked_nanos
    if Status.SUCCEEDED in booked:
        raise CommandRefusedError(
            "already_booked", f"The payment {command.payment_id} is booked already."
        )
    draft.credit(
        EntryKind.PURCHASE,
        amount_nanos,
        details={"payment_id": command.payment_id, "reason": command.reason},
    )
    recharge.count_money(draft, amount_nanos)
    recharge.paid_by_hand(draft)
    draft.payment = Payment(
        payment_id=command.payment_id,
        currency=account.currency,
        origin=EntryKind.PURCHASE,
        booked_nanos={**booked, Status.SUCCEEDED: amount_nanos},
        disputed_nanos=0 if payment is None else payment.disputed_nanos,
        kept_until=draft.now + PAYMENT_KEPT,
    )


def _adjust(draft: Draft, command: Adjustment) -> None:
    amount_nanos = _money(command.amount, draft.account)
    if not amount_nanos:
        raise CommandRefusedError("amount_zero", "An adjustment of zero changes nothing.")
    if amount_nanos < 0:
        draft.debit(EntryKind.ADJUSTMENT, -amount_nanos, draft.now, {"reason": command.reason})
        return
    expires_at = None if command.expires_at is None else utc(command.expires_at)
    granting.check_end(expires_at, draft.now)
    draft.credit(
        EntryKind.ADJUSTMENT,
        amount_nanos,
        expires_at=expires_at,
        details={"reason": command.reason},
    )


def _with_change(
    changes: Iterable[_Change],
    changed: _Change,
    since_of: Callable[[_Change], datetime],
    now: datetime,
) -> list[_Change]:
    """A history in order with one more change, instead of the one at its instant. What no call can
    start under any more is forgotten, but for the last before it."""
    since = since_of(changed)
    kept = [one for one in changes if since_of(one) != since]
    kept.append(changed)
    kept.sort(key=since_of)
    old = [one for one in kept if since_of(one) < now - FORMER_KEPT]
    return kept[max(0, len(old) - 1) :]


def _assign_deck(draft: Draft, command: TariffAssignment) -> None:
    now, account = draft.now, draft.account
    since = now if command.effective_from is None else utc(command.effective_from)
    if since < now - LATEST:
        raise CommandRefusedError(
            "effective_from", "A deck is assigned from an instant of the last 35 days, or later."
        )
    changed = Assignment(command.deck, since)
    kept = _with_change(account.standing.decks, changed, lambda one: one.effective_from, now)
    if len(kept) > MOST_ASSIGNMENTS:
        raise CommandRefusedError(
            "too_many_assignments",
            f"A tenant's deck changes at most {MOST_ASSIGNMENTS} times in {FORMER_KEPT.days} days.",
        )
    draft.account = account.changed(decks=tuple(kept))


def _licences(draft: Draft, command: Licences, coverage: Coverage) -> None:
    now, account = draft.now, draft.account
    _check_plan(command, coverage)
    since = now if command.effective_from is None else utc(command.effective_from)
    if since < now - LATEST:
        raise CommandRefusedError(
            "effective_from", "Licences change at an instant of the last 35 days, or later."
        )
    held = Licensed(command.capability, command.country, ())
    others: list[Licensed] = []
    for one in account.standing.pools:
        if (one.plan, one.country) == (held.plan, held.country):
            held = one
        else:
            others.append(one)
    changed = LicenceCount(since, command.count)
    counts = _with_change(held.changes, changed, lambda one: one.since, now)
    if len(counts) > MOST_LICENCE_CHANGES:
        raise CommandRefusedError(
            "too_many_changes",
            f"Licences of a plan change at most {MOST_LICENCE_CHANGES} times in "
            f"{FORMER_KEPT.days} days.",
        )
    others.append(replace(held, counts=counts_from(counts)))
    following: list[Licensed] = []
    for one in others:
        one = replace(one, used=used_from(pools.kept(account, one, now)))
        # Without licences, and no call can come that started when it had some: it is forgotten.
        last = one.changes[-1]
        if last.count or one.used or last.since > now - FORMER_KEPT:
            following.append(one)
    if sum(len(one.changes) - 1 for one in following) > MOST_CHANGES_IN_ALL:
        raise CommandRefusedError(
            "too_many_changes",
            f"Licences of all plans change at most {MOST_CHANGES_IN_ALL} times in "
            f"{FORMER_KEPT.days} days, the first of each not counted.",
        )
    if len(following) > MOST_PLANS:
        raise CommandRefusedError(
            "too_many_plans", f"A tenant has at most {MOST_PLANS} plans, counted by country."
        )
    following.sort(key=lambda one: (one.plan, one.country or ""))
    draft.account = account.changed(pools=tuple(following))


def _check_plan(command: Licences, coverage: Coverage) -> None:
    name, country = command.capability, command.country
    plan = coverage.plans.get(name)
    if plan is None:
        raise CommandRefusedError(
            "unknown_plan",
            f"{name} is no plan with included minutes; known are "
            f"{', '.join(coverage.plans) or 'none'}.",
        )
    if plan.shared:
        if country is not None:
            raise CommandRefusedError(
                "country", f"The minutes of {name} are the whole tenant's; give no country."
            )
        return
    if country is None:
        raise CommandRefusedError("country", f"{name} counts by country; say where its users are.")
    if not any(plan.minutes_of(pool, country) for pool in plan.minutes):
        known = {one for by_country in plan.minutes.values() for one in by_country}
        raise CommandRefusedError(
            "country",
            f"{name} includes no minutes in {country}; it does in {' '.join(sorted(known))}.",
        )


def _approve(draft: Draft) -> None:
    _not_closed(draft)
    if not recharge.approve(draft):
        raise CommandRefusedError("nothing_to_approve", _nothing_waits(draft))


def _deny(draft: Draft) -> None:
    if not recharge.deny(draft):
        raise CommandRefusedError("nothing_to_deny", _nothing_waits(draft))


def _not_closed(draft: Draft) -> None:
    if draft.account.standing.closed_at is not None:
        raise CommandRefusedError("closed", "The account is closed; open it again first.")


def _nothing_waits(draft: Draft) -> str:
    stage = draft.account.standing.recharging.stage
    return (
        f"No recharge waits for approval; auto-recharge is {stage}. "
        "A pause ends with money or a new payment method."
    )


def _resolve(draft: Draft, command: ResolveRecharge, payment: Payment | None) -> None:
    """A person's word about a request nobody answered: paid, with its payment, or not paid."""
    account = draft.account
    current = account.standing.recharging.asked
    fund = next(
        (one for one in account.standing.funds if one.recharge_id == command.recharge_id), None
    )
    if current is not None and current.recharge_id == command.recharge_id:
        asked = current
    elif fund is not None:
        asked = fund
    else:
        raise CommandRefusedError(
            "not_in_flight",
            f"{command.recharge_id} is not in flight; book money that came with `credits topup "
            "--already-paid`.",
        )
    if command.paid:
        _resolve_paid(draft, command, payment, EntryKind.RECHARGE if fund is None else None)
    else:
        if command.payment_id is not None or command.amount is not None:
            raise CommandRefusedError(
                "not_paid", "Give payment_id and amount only when it was paid."
            )
        decided_from = asked.requested_at + UNANSWERED_FOR
        if draft.now < decided_from:
            raise CommandRefusedError(
                "too_early",
                "The payment service may still answer; wait until "
                f"{decided_from.isoformat(timespec='seconds')}, or cancel the payment there.",
            )
    if fund is None:
        recharge.resolve(draft, paid=command.paid)
    else:
        left = tuple(one for one in draft.account.standing.funds if one is not fund)
        draft.account = draft.account.changed(funds=left)
        if command.paid:
            recharge.paid_by_hand(draft)
        else:
            results.keep_unpaid(draft, fund)
    draft.notify(
        NoticeKind.RECHARGE_RESOLVED,
        recharge_id=command.recharge_id,
        payment_id=command.payment_id,
        rule="paid" if command.paid else "not_paid",
    )


def _resolve_paid(
    draft: Draft, command: ResolveRecharge, payment: Payment | None, kind: EntryKind | None
) -> None:
    if command.payment_id is None or command.amount is None:
        raise CommandRefusedError(
            "payment_missing", "Say which payment it was: give payment_id and amount."
        )
    amount_nanos = _money(command.amount, draft.account)
    if amount_nanos <= 0:
        raise CommandRefusedError("amount_positive", "Give an amount above zero.")
    if payment is not None and payment.booked_nanos.get(Status.SUCCEEDED):
        raise CommandRefusedError(
            "already_booked",
            f"The payment {command.payment_id} is booked already; resolve the request as not paid.",
        )
    kind = kind or EntryKind.PURCHASE
    draft.credit(
        kind,
        amount_nanos,
        details={
            "recharge_id": command.recharge_id,
            "payment_id": command.payment_id,
            "reason": command.reason,
        },
    )
    recharge.count_money(draft, amount_nanos)
    booked_nanos = {} if payment is None else payment.booked_nanos
    draft.payment = Payment(
        payment_id=command.payment_id,
        recharge_id=command.recharge_id,
        currency=draft.account.currency,
        origin=kind,
        booked_nanos={**booked_nanos, Status.SUCCEEDED: amount_nanos},
        disputed_nanos=0 if payment is None else payment.disputed_nanos,
        kept_until=draft.now + PAYMENT_KEPT,
    )
