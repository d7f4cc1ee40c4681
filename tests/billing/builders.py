"""Things to test with. Defaults stay silent, so whatever a test writes matters."""

import ast
import itertools
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from schemas import topics
from schemas.commands import (
    Adjustment,
    AnyCommand,
    BookPayment,
    CloseTenant,
    Fund,
    Grant,
    OpenTenant,
    RechargePolicy,
    ResolveRecharge,
    Settings,
    Void,
)
from schemas.funding import RechargeRequest, RechargeResult, Status
from schemas.ledger import LedgerEntry
from schemas.money import Money
from schemas.nanos import NANOS
from schemas.usage import CallUsage, Kind, Phase
from streams.billing import holds, ledger
from streams.billing.account import Account
from streams.billing.events import (
    Cause,
    CommandEvent,
    Event,
    ResultEvent,
    Tick,
    UsageEvent,
)
from streams.billing.legs import usage_event
from streams.billing.outcomes import Outcome, Terms
from streams.billing.parts import NO_HASH, Hold
from streams.billing.rates import Rate, Tariff

NOW = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
ROOT = Path(__file__).parents[2]
LONDON = "+442079460018"
_places = itertools.count()


def usd(text: str) -> int:
    """An amount in nanos."""
    units, _, decimals = text.lstrip("-").partition(".")
    nanos = int(units) * NANOS + int(decimals.ljust(9, "0") or 0)
    return -nanos if text.startswith("-") else nanos


def some_terms(**changes: Any) -> Terms:
    """London costs one dollar a minute, so that charges are easy to read."""
    rates = {
        "4420": Rate(prefix="4420", per_minute=NANOS, per_minute_text="1"),
        "33": Rate(prefix="33", per_minute=6_000_000, per_minute_text="0.006"),
    }
    return Terms(**{"tariff": Tariff("default", "file-test", rates)} | changes)


def a_cause(topic: str = topics.CALL_USAGE, name: str | None = None) -> Cause:
    place = next(_places)
    return Cause(topic, 0, place, "test", name or f"e{place}")


def a_call(**changes: Any) -> UsageEvent:
    """A call to London that ended just now; one minute, one dollar."""
    cause = changes.pop("cause", None) or a_cause()
    members: dict[str, Any] = {
        "kind": Kind.INTERNATIONAL,
        "call_id": "c",
        "callee": LONDON,
        "started_at": NOW - timedelta(seconds=60),
        "duration_s": 60,
    } | changes
    return usage_event(CallUsage(**members), cause)


def minutes(count: int, **changes: Any) -> UsageEvent:
    """A call that costs that many dollars."""
    return a_call(duration_s=60 * count, started_at=NOW - timedelta(seconds=60 * count), **changes)


def a_command(command: AnyCommand, name: str | None = None, **more: Any) -> CommandEvent:
    return CommandEvent(command, a_cause(topics.COMMAND, name), **more)


def opening(**changes: Any) -> OpenTenant:
    members: dict[str, Any] = {
        "tenant_id": "t-1",
        "issued_at": NOW,
        "currency": "USD",
        "billing_from": NOW - timedelta(days=40),
    } | changes
    return OpenTenant(**members)


def an_account(balance: str = "0", **policy: Any) -> Account:
    """An open account with money in it; with a policy when one is given."""
    outcome = apply(None, a_command(opening(opening_balance=balance)))
    account = outcome.account
    assert account is not None
    if policy:
        account = with_policy(account, **policy)
    return account


def with_policy(account: Account, methods: list[str] | None = None, **policy: Any) -> Account:
    members: dict[str, Any] = {"enabled": True, "trigger": "100", "amount": "200"} | policy
    command = Settings(
        tenant_id="t-1",
        issued_at=NOW,
        expected_version=account.standing.settings_version,
        policy=RechargePolicy(**members),
        payment_methods=methods,
    )
    outcome = apply(account, a_command(command))
    assert outcome.label == "applied", outcome.notices
    assert outcome.account is not None
    return outcome.account


def requested(account: Account, by: int = 0) -> tuple[Account, RechargeRequest]:
    """The account after a call has taken it below its trigger, and the request."""
    outcome = apply(account, minutes(by or 1))
    assert len(outcome.requests) == 1, outcome
    assert outcome.account is not None
    return outcome.account, outcome.requests[0]


def a_result(recharge_id: str, status: Status = Status.SUCCEEDED, **changes: Any) -> ResultEvent:
    payment = changes.pop("payment", None)
    amount = changes.pop("amount", None)
    members: dict[str, Any] = {
        "tenant_id": "t-1",
        "recharge_id": recharge_id,
        "payment_id": f"p-{recharge_id}",
        "status": status,
        "amount": None if amount is None else Money(amount=amount, currency="USD"),
        "occurred_at": NOW,
    } | changes
    return ResultEvent(RechargeResult(**members), a_cause(topics.RESULT), payment)


def apply(account: Account | None, event: Event, now: datetime = NOW, **terms: Any) -> Outcome:
    """The one door, with defaults."""
    return ledger.apply(account, event, some_terms(**terms), now)


def _looked_around(
    account: Account, outcome: Outcome, event: Event, now: datetime, terms: Any
) -> None:
    """A balance within its quiet band has nothing to ask for and nothing to tell: an account that
    has no such band decides the same."""
    watchful = account.changed()
    watchful.standing.quiet_above_nanos = watchful.standing.quiet_below_nanos
    decided = apply(watchful, event, now, **terms)
    for name in ("account", "label", "entries", "requests", "notices", "withheld", "hold"):
        assert getattr(decided, name) == getattr(outcome, name), name


class Book:
    """A shard in miniature: one tenant, its payments, its open calls and its ledger."""

    def __init__(self, account: Account | None = None) -> None:
        self.account = account
        self.payments: dict[str, Any] = {}
        self.holds: dict[str, Hold] = {}
        self.entries: list[bytes] = []
        self.requests: list[RechargeRequest] = []
        self.notices: list[Any] = []
        self.moved = account.balance_nanos if account else 0

    def feed(self, event: Event, now: datetime = NOW, **terms: Any) -> Outcome:
        """Tick what is due, then apply."""
        while self.account is not None:
            due = self.account.next_due()
            if due is None or due > now:
                break
            self._apply(Tick(due), now, terms)
        for leg, hold in sorted(self.holds.items(), key=lambda one: one[1].until):
            if hold.until <= now:
                if not hold.ended:
                    self._apply(Tick(hold.until, hold), now, terms)
                del self.holds[leg]
        return self._apply(event, now, terms)

    def _with_hold(self, event: UsageEvent) -> UsageEvent:
        assert self.account is not None
        if event.phase is Phase.END and not self.account.standing.holds and event.leg_id is None:
            return event
        leg = holds.leg_of(event)
        return event.about(leg, self.holds.get(leg))

    def _apply(self, event: Event, now: datetime, terms: Any) -> Outcome:
        if isinstance(event, ResultEvent):
            known = self.payments.get(event.result.payment_id)
            event = ResultEvent(event.result, event.cause, known)
        elif isinstance(event, CommandEvent) and isinstance(
            event.command, BookPayment | ResolveRecharge
        ):
            known = self.payments.get(event.command.payment_id or "")
            event = CommandEvent(event.command, event.cause, known)
        elif isinstance(event, UsageEvent) and self.account is not None:
            event = self._with_hold(event)
        outcome = apply(self.account, event, now, **terms)
        if isinstance(event, UsageEvent) and self.account is not None:
            _looked_around(self.account, outcome, event, now, terms)
        self.account = outcome.account
        if outcome.payment is not None:
            self.payments[outcome.payment.payment_id] = outcome.payment
        if outcome.hold is not None:
            assert isinstance(event, UsageEvent)
            assert outcome.hold.until > now
            self.holds[event.leg] = outcome.hold
        self.entries += outcome.entries
        self.requests += outcome.requests
        self.notices += outcome.notices
        self.moved += sum(nanos for _, nanos in outcome.moved)
        return outcome

    @property
    def balance_nanos(self) -> int:
        assert self.account is not None
        return self.account.balance_nanos

    @property
    def stage(self) -> str:
        assert self.account is not None
        return self.account.standing.recharging.stage


def entries_of(entries: Iterable[bytes], name: str) -> tuple[LedgerEntry, ...]:
    """What an event has caused, as a correction of it brings it along."""
    read = (msgspec.json.decode(one, type=LedgerEntry) for one in entries)
    return tuple(one for one in read if one.caused_by.id == name)


def corrected(event: UsageEvent, of: str, entries: list[bytes], name: str) -> UsageEvent:
    """The event as a correction of another, with what that one has caused."""
    return changed(
        event,
        phase=Phase.CORRECTION,
        corrects=of,
        cause=a_cause(name=name),
        original=entries_of(entries, of),
    )


def changed(event: UsageEvent, **members: Any) -> UsageEvent:
    """The event with other members."""
    kept = {name: getattr(event, name) for name in parameters_of(UsageEvent)}
    return UsageEvent(**kept | members)


def parameters_of(kind: type) -> list[str]:
    """What a class is made from, as its source says it: a compiled one cannot be asked."""
    path = Path(*kind.__module__.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            [init] = [one for one in node.body if getattr(one, "name", "") == "__init__"]
            assert isinstance(init, ast.FunctionDef)
            return [one.arg for one in (*init.args.args[1:], *init.args.kwonlyargs)]
    raise AssertionError(f"no class {kind.__name__} in {path}")


def chain_holds(entries: list[bytes], head: bytes = NO_HASH, seq: int = 0) -> bool:
    """Check numbers and hashes on raw bytes, as anybody could."""
    for value in entries:
        body, _, rest = value.rpartition(b',"hash":"')
        head = sha256(head + body).digest()
        seq += 1
        if rest != head.hex().encode() + b'"}' or json.loads(value)["seq"] != seq:
            return False
    return True


def told(outcome: Outcome) -> list[str]:
    """The kinds of notices."""
    return [notice.notice.value for notice in outcome.notices]


def a_fund(amount: str, currency: str = "USD") -> Fund:
    return Fund(tenant_id="t-1", issued_at=NOW, amount=Money(amount=amount, currency=currency))


def an_adjustment(amount: str, **changes: Any) -> Adjustment:
    return Adjustment(
        tenant_id="t-1",
        issued_at=NOW,
        amount=Money(amount=amount, currency=changes.pop("currency", "USD")),
        reason="a test",
        **changes,
    )


def a_grant(amount: str, **changes: Any) -> Grant:
    """Promotional money without an end, now."""
    money = Money(amount=amount, currency=changes.pop("currency", "USD"))
    members: dict[str, Any] = {"reason": "a gift"} | changes
    return Grant(tenant_id="t-1", issued_at=NOW, amount=money, **members)


def a_void(grant_id: str) -> Void:
    return Void(tenant_id="t-1", issued_at=NOW, grant_id=grant_id, reason="by mistake")


def a_payment(amount: str, payment_id: str = "wire-1") -> BookPayment:
    return BookPayment(
        tenant_id="t-1",
        issued_at=NOW,
        payment_id=payment_id,
        amount=Money(amount=amount, currency="USD"),
    )


def closing() -> CloseTenant:
    return CloseTenant(tenant_id="t-1", issued_at=NOW)


def settings(expected_version: int, **members: Any) -> Settings:
    return Settings(tenant_id="t-1", issued_at=NOW, expected_version=expected_version, **members)


def decoded(entry: bytes) -> dict[str, Any]:
    members: dict[str, Any] = msgspec.json.decode(entry)
    return members


def a_resolution(
    recharge_id: str,
    *,
    paid: bool,
    payment_id: str | None = None,
    amount: str | None = None,
    currency: str = "USD",
) -> ResolveRecharge:
    return ResolveRecharge(
        tenant_id="t-1",
        issued_at=NOW,
        recharge_id=recharge_id,
        paid=paid,
        payment_id=payment_id,
        amount=None if amount is None else Money(amount=amount, currency=currency),
    )
