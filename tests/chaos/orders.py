"""What administrators do while everything breaks: a stream of commands made from a seed, which
knows the answers that each may get, and says what is wrong with those that came.

Settings change, money is added and taken, licences come and go. Some commands are written twice,
some take another's id, some make no sense, some are no commands at all.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import orjson
from msgspec import Struct

from schemas import topics
from schemas.envelope import binary_headers
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing import recharge
from streams.testbed import load
from streams.testbed.load import Expected, Planned

SOURCE: Final = "chaos-office"
# One for so many records of usage, on average.
USAGE_TO_ONE: Final = 50
# Most is done to a few tenants: there commands meet each other, and their bounds.
BUSY: Final = 12
CONFERENCES: Final = "MCOMEETADV"
# A plan's licences, and a tenant's deck, change so often in 66 days.
MOST_LICENCE_CHANGES: Final = 12
MOST_DECK_CHANGES: Final = 12
# A deck of its own for some; it must have been published before.
PARTNERS: Final = "partners"
# No load has usage of them: they are opened and closed again and again.
VISITORS: Final = 4
NOBODY: Final = "t-nobody-commanded"
# Risk classes of destinations in the decks that a campaign publishes, and one that is in none.
MOBILE: Final = "mobile"
FAR: Final = "far"
NOWHERE: Final = "nowhere"

APPLIED: Final = "applied"
REPEATED: Final = "repeated"
CONFLICT: Final = DeadLetterReason.CONFLICT.value
_USD: Final = {"currency": "USD"}
_REMEMBERED: Final = 200

Body = dict[str, Any]


class Order(Struct, frozen=True):
    """A command as it is written, and what may be answered to it the first time: `applied`, or the
    rule that refuses it; nothing when it is a dead letter and no more."""

    planned: Planned
    tenant: str
    answers: frozenset[str]


class _Tenant:
    """What the office knows of a tenant: it alone sends commands to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = False
        self.open = False
        self.version = 0
        self.grants: list[str] = []
        self.payments: list[str] = []
        # The instants at which those for conferences change, and at which the deck does.
        self.licences: set[str] = set()
        self.decks: set[str] = set()


class Office:
    """Commands for the tenants of a load, in the order in which they are to be written; what may
    come of each is kept by its id."""

    def __init__(self, plan: load.Plan, start: datetime) -> None:
        self._dice = random.Random(f"office/{plan.seed}")
        # With dice of their own, so that all other orders of a seed stay what they were.
        self._limits = random.Random(f"limits/{plan.seed}")
        self.plan, self._start = plan, start
        opened: dict[str, _Tenant] = {}
        for name, _, command in load.opening_commands(plan, start):
            tenant = opened.setdefault(name, _Tenant(name))
            tenant.known = tenant.open = True
            tenant.version += command["command"] == "settings"
            if command.get("capability") == CONFERENCES:
                tenant.licences.add(command["effective_from"])
        self._tenants = list(opened.values())
        self._busy = self._dice.sample(self._tenants, min(BUSY, len(self._tenants)))
        self._visitors = [_Tenant(f"t-visitor-{number}") for number in range(VISITORS)]
        self._recent: list[Order] = []
        self._made = 0
        self.orders: dict[str, Order] = {}

    def following(self) -> Iterator[Planned]:
        """The next record to write, and again."""
        while True:
            roll = self._dice.randrange(100)
            if roll < 12 and self._recent:
                yield self._again(self._dice.choice(self._recent))
            elif roll < 15 and self._recent:
                yield self._contradicts(self._dice.choice(self._recent))
            elif roll < 20:
                yield self._broken()
            else:
                yield self._one()

    # -- one command -------------------------------------------------------------------------

    def _one(self) -> Planned:
        dice = self._dice
        roll = dice.randrange(100)
        if roll < 8:
            return self._visit(dice.choice(self._visitors))
        tenant = dice.choice(self._busy if roll < 60 else self._tenants)
        if dice.randrange(4) == 0:
            body, rule = dice.choice(_NONSENSE)(self, tenant)
            name = NOBODY if rule == "unknown_tenant" else tenant.name
            return self._order(name, body, rule)
        done = dice.choices(list(_SENSIBLE), list(_SENSIBLE.values()))[0]
        return done(self, tenant)

    def _order(self, tenant: str, body: Body, *answers: str, order_id: str = "") -> Planned:
        order_id = order_id or self._next_id()
        planned = _record(tenant, order_id, body, self._start)
        order = Order(planned, tenant, frozenset(answers))
        self.orders[order_id] = order
        if len(self._recent) < _REMEMBERED:
            self._recent.append(order)
        else:
            self._recent[self._dice.randrange(_REMEMBERED)] = order
        return planned

    def _next_id(self) -> str:
        self._made += 1
        return f"o-{self.plan.seed}-{self._made}"

    def _again(self, order: Order) -> Planned:
        """The same once more, by somebody who has heard no answer."""
        return order.planned

    def _contradicts(self, order: Order) -> Planned:
        """Something else under an id that is taken."""
        order_id = order.planned.event_id
        body = {"command": "adjustment", "amount": _USD | {"amount": "77"}, "reason": "taken id"}
        return _record(order.tenant, order_id, body, self._start, DeadLetterReason.CONFLICT)

    def _broken(self) -> Planned:
        """What is no command: a dead letter, and no answer."""
        tenant = self._dice.choice(self._tenants).name
        value, reason = self._dice.choice(_BROKEN)
        order_id, misplaced = self._next_id(), 0
        planned = _record(tenant, order_id, {}, self._start, reason)
        if reason is DeadLetterReason.WRONG_PARTITION:
            misplaced = 1 + self._dice.randrange(3)
        planned = Planned(
            planned.topic, planned.key, value, planned.headers, Expected.DEAD_LETTER, reason,
            misplaced, order_id,
        )  # fmt: skip
        self.orders[order_id] = Order(planned, tenant, frozenset())
        return planned

    # -- what makes sense --------------------------------------------------------------------

    def _settings(self, tenant: _Tenant, **changes: Any) -> Body:
        return {"command": "settings", "expected_version": tenant.version} | changes

    def _sets(self, tenant: _Tenant) -> Planned:
        dice = self._dice
        changes: Body = {}
        if dice.randrange(3):
            changes["policy"] = self._policy()
        if dice.randrange(2):
            changes["payment_methods"] = dice.choice(
                (["card-1"], ["card-2", "card-1"], ["card-1", "card-2"], ["card-3", "card-1"])
            )
        if dice.randrange(4) == 0:
            changes["alert_levels"] = sorted(dice.sample((5, 10, 20, 50, 75, 90), 2))
        planned = self._order(tenant.name, self._settings(tenant, **changes), APPLIED)
        tenant.version += 1
        return planned

    def _policy(self) -> Body:
        dice = self._dice
        policy: Body = {
            "enabled": dice.randrange(4) > 0,
            "trigger": str(dice.choice((20, 60, 100, 150, 300))),
            "compare": dice.choice(("lt", "le")),
            "cooldown_s": dice.choice((0, 1, 5)),
            "max_per_day": 1_000,
            "method": dice.choice(("fixed", "fixed_multiple", "target", "gap_plus_amount")),
        }
        if self._limits.randrange(3) == 0:
            policy["velocity"] = self._velocity()
        if policy["method"] == "target":
            return policy | {"target": str(dice.choice((300, 450)))}
        return policy | {"amount": str(dice.choice((50, 75, 120, 200)))}

    def _velocity(self) -> dict[str, str]:
        """Limits of risk classes that are reached at once, soon, or never."""
        dice = self._limits
        classes = dice.sample((MOBILE, FAR, NOWHERE), dice.randrange(1, 4))
        return {one: dice.choice(("0", "2.5", "20", "5000")) for one in classes}

    def _funds(self, tenant: _Tenant) -> Planned:
        body: Body = {"command": "fund", "amount": self._money((50, 60, 95))}
        if self._dice.randrange(2):
            body["payment_method"] = "card-9"
        return self._order(tenant.name, body, APPLIED, "too_many_open")

    def _books(self, tenant: _Tenant) -> Planned:
        payment = f"bank-{self._next_id()}"
        tenant.payments.append(payment)
        body = {"command": "book_payment", "payment_id": payment, "reason": "by bank"}
        return self._order(tenant.name, body | {"amount": self._money((15, 40, 250))}, APPLIED)

    def _adjusts(self, tenant: _Tenant) -> Planned:
        body: Body = {"command": "adjustment", "reason": "goodwill"}
        body["amount"] = self._money((-30, -7, -1, 3, 12, 25))
        if not body["amount"]["amount"].startswith("-") and self._dice.randrange(3) == 0:
            body["expires_at"] = self._at(timedelta(days=self._dice.randrange(1, 60)))
        return self._order(tenant.name, body, APPLIED)

    def _grants(self, tenant: _Tenant) -> Planned:
        body: Body = {"command": "grant", "reason": "gift", "amount": self._money((2, 9, 20))}
        body["priority"] = self._dice.choice((10, 100))
        body["kind"] = self._dice.choice(("paid", "promotional"))
        if self._dice.randrange(2):
            body["expires_at"] = self._at(timedelta(days=self._dice.randrange(1, 90)))
        order_id = self._next_id()
        tenant.grants.append(_lot_of(order_id))
        return self._order(tenant.name, body, APPLIED, order_id=order_id)

    def _voids(self, tenant: _Tenant) -> Planned:
        if not tenant.grants:
            return self._grants(tenant)
        body = {"command": "void", "reason": "a mistake"}
        body["grant_id"] = self._dice.choice(tenant.grants[-5:])
        # Usage may have taken it, or it has become one with another.
        return self._order(tenant.name, body, APPLIED, "nothing_left")

    def _licenses(self, tenant: _Tenant) -> Planned:
        since = self._at(timedelta(hours=self._dice.randrange(-800, 200)))
        body = {
            "command": "licences",
            "capability": CONFERENCES,
            "count": self._dice.randrange(4),
            "effective_from": since,
        }
        # Another word about the same instant stands in place of the first.
        if len(tenant.licences | {since}) > MOST_LICENCE_CHANGES:
            return self._order(tenant.name, body, "too_many_changes")
        tenant.licences.add(since)
        return self._order(tenant.name, body, APPLIED)

    def _assigns(self, tenant: _Tenant) -> Planned:
        since = self._at(timedelta(hours=self._dice.randrange(-800, 200)))
        body = {"command": "tariff_assignment", "effective_from": since}
        body["deck"] = self._dice.choice(("default", PARTNERS))
        if len(tenant.decks | {since}) > MOST_DECK_CHANGES:
            return self._order(tenant.name, body, "too_many_assignments")
        tenant.decks.add(since)
        return self._order(tenant.name, body, APPLIED)

    def _decides(self, tenant: _Tenant) -> Planned:
        word = self._dice.choice(("approve", "deny"))
        return self._order(tenant.name, {"command": word}, APPLIED, f"nothing_to_{word}")

    def _resolves(self, tenant: _Tenant) -> Planned:
        """A person says that a request was paid, while its answer may be under way as well."""
        epoch = 1 + self._dice.randrange(12)
        body: Body = {"command": "resolve_recharge", "paid": bool(self._dice.randrange(4))}
        body["recharge_id"] = recharge.recharge_id(tenant.name, epoch, 1)
        if not body["paid"]:
            return self._order(tenant.name, body, "too_early", "not_in_flight")
        body |= {"payment_id": f"word-{self._next_id()}", "amount": self._money((50, 80))}
        return self._order(tenant.name, body, APPLIED, "not_in_flight")

    def _visit(self, tenant: _Tenant) -> Planned:
        """A tenant comes or goes, or is asked for what cannot be done to one that has gone."""
        roll = self._dice.randrange(4)
        opening = {"command": "open_tenant", "currency": "USD", "billing_from": self._at()}
        if not tenant.open and roll:
            money = {} if tenant.known else {"opening_balance": "12.5"}
            tenant.open = tenant.known = True
            return self._order(tenant.name, opening | money, APPLIED)
        if tenant.open and roll:
            tenant.open = False
            return self._order(tenant.name, {"command": "close_tenant"}, APPLIED)
        if tenant.open:
            return self._order(tenant.name, opening, "already_open")
        body = {"command": "grant", "reason": "too late", "amount": self._money((5,))}
        return self._order(tenant.name, body, "closed" if tenant.known else "unknown_tenant")

    def _money(self, amounts: Sequence[int]) -> Body:
        return _USD | {"amount": f"{self._dice.choice(amounts)}.{self._dice.randrange(100):02}"}

    def _at(self, ahead: timedelta = timedelta(0)) -> str:
        return (self._start + ahead).isoformat()


def _record(
    tenant: str,
    order_id: str,
    body: Body,
    start: datetime,
    reason: DeadLetterReason | None = None,
) -> Planned:
    issued = {"issued_at": start.isoformat(), "issued_by": SOURCE}
    headers = binary_headers(topics.COMMAND, source=SOURCE, event_id=order_id)
    # What a load foresees of its usage counts no command; only dead letters are counted together.
    expected = Expected.DUPLICATE if reason is None else Expected.DEAD_LETTER
    return Planned(
        topics.COMMAND, tenant.encode(), orjson.dumps(body | issued), tuple(headers), expected,
        reason, 0, order_id,
    )  # fmt: skip


def _lot_of(order_id: str) -> str:
    return "c" + hashlib.sha256(f"{SOURCE}\0{order_id}".encode()).hexdigest()[:12]


_SENSIBLE: Final[Mapping[Callable[[Office, _Tenant], Planned], int]] = {
    Office._sets: 30,
    Office._funds: 10,
    Office._books: 14,
    Office._adjusts: 18,
    Office._grants: 14,
    Office._voids: 8,
    Office._licenses: 10,
    Office._assigns: 6,
    Office._decides: 4,
    Office._resolves: 8,
}


def _said(rule: str, **body: Any) -> Callable[[Office, _Tenant], tuple[Body, str]]:
    return lambda _office, _tenant: (body, rule)


def _set(rule: str, *, ahead: int = 0, **changes: Any) -> Callable[..., tuple[Body, str]]:
    """Settings of which one part is right and another is not."""

    def make(office: Office, tenant: _Tenant) -> tuple[Body, str]:
        body = office._settings(tenant, **({"policy": office._policy()} | changes))
        return body | {"expected_version": tenant.version + ahead}, rule

    return make


def _booked_again(office: Office, tenant: _Tenant) -> tuple[Body, str]:
    payment = tenant.payments[-1] if tenant.payments else None
    body: Body = {"command": "book_payment", "amount": _USD | {"amount": "31"}}
    if payment is None:
        return body | {"payment_id": "none", "amount": _USD | {"amount": "0"}}, "amount_positive"
    return body | {"payment_id": payment}, "already_booked"


_POLICY: Final = {"enabled": True, "trigger": "90", "amount": "60"}
_TEN: Final = _USD | {"amount": "10"}
_EUR: Final = {"currency": "EUR", "amount": "60"}

_NONSENSE: Final = (
    _set("version_conflict", ahead=1),
    _set("version_conflict", ahead=-1),
    _set("payment_methods", payment_methods=["card-5", "card-5"]),
    _set("overdraft_floor", payment_methods=["card-6"], overdraft_floor="-1"),
    _set("alert_levels", payment_methods=["card-7"], alert_levels=[30, 30]),
    _set("trigger_minimum", policy=_POLICY | {"trigger": "4.99"}, payment_methods=["card-8"]),
    _set("amount_minimum", policy=_POLICY | {"amount": "49.99"}),
    _set("target_below_trigger", policy=_POLICY | {"method": "target", "target": "89"}),
    _set("min_above_max", policy=_POLICY | {"min_amount": "80", "max_amount": "70"}),
    _booked_again,
    _said("amount_zero", command="adjustment", amount=_USD | {"amount": "0"}, reason="none"),
    _said("currency_mismatch", command="adjustment", amount=_EUR, reason="wrong money"),
    _said(
        "expires_at", command="adjustment", amount=_TEN, reason="over",
        expires_at="2020-01-01T00:00:00Z",
    ),
    _said("amount_positive", command="grant", amount=_USD | {"amount": "-5"}, reason="taken"),
    _said("recurrence", command="grant", amount=_TEN, reason="x", every_days=1, every_months=1),
    _said("unknown_grant", command="void", grant_id="the-gift", reason="none such"),
    _said("nothing_left", command="void", grant_id="c0123456789ab", reason="none such"),
    _said("amount_minimum", command="fund", amount=_USD | {"amount": "1"}),
    _said("currency_mismatch", command="fund", amount=_EUR),
    _said("currency_mismatch", command="book_payment", payment_id="euro", amount=_EUR),
    _said("unknown_plan", command="licences", capability="MCONONE", count=3),
    _said("country", command="licences", capability="MCOPSTN5", count=3),
    _said("country", command="licences", capability="MCOMEETADV", count=3, country="US"),
    _said("already_open", command="open_tenant", currency="USD", opening_balance="500"),
    _said("not_in_flight", command="resolve_recharge", recharge_id="none", paid=False),
    _said("unknown_tenant", command="adjustment", amount=_TEN, reason="nobody's"),
)  # fmt: skip

_BROKEN: Final = (
    (b'{"command": ', DeadLetterReason.MALFORMED_JSON),
    (b"", DeadLetterReason.MALFORMED_JSON),
    (
        b'{"command":"explode","issued_at":"2026-01-01T00:00:00Z"}',
        DeadLetterReason.SCHEMA_VIOLATION,
    ),
    (
        b'{"command":"adjustment","issued_at":"2026-01-01T00:00:00Z","reason":"a number",'
        b'"amount":{"amount":5,"currency":"USD"}}',
        DeadLetterReason.SCHEMA_VIOLATION,
    ),
    (
        b'{"command":"close_tenant","issued_at":"2026-01-01T00:00:00Z","tenant_id":"t-other"}',
        DeadLetterReason.KEY_MISMATCH,
    ),
    (
        b'{"command":"close_tenant","issued_at":"2026-01-01T00:00:00Z"}',
        DeadLetterReason.WRONG_PARTITION,
    ),
)


class Answers:
    """What was answered, order by order, in the order of the topic."""

    def __init__(self) -> None:
        self._came: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def take(self, notice: Mapping[str, Any], orders: Mapping[str, Order]) -> None:
        """A notice; it may be about something else."""
        order_id = str(notice.get("command_id"))
        if order_id not in orders:
            return
        answer = {
            NoticeKind.COMMAND_APPLIED: APPLIED,
            NoticeKind.COMMAND_REPEATED: REPEATED,
            NoticeKind.COMMAND_REFUSED: notice.get("rule", "refused"),
        }.get(notice["notice"])
        if answer is not None:
            self._came.setdefault(order_id, []).append(answer)
            self.counts[answer] += 1

    def faults(self, written: Mapping[str, int], orders: Mapping[str, Order]) -> Iterator[str]:
        """What is wrong with the answers to what was written, so many times each: one decides, as
        it was foreseen, and whatever else came under its id was recognised."""
        for order_id, times in written.items():
            order = orders[order_id]
            came = self._came.get(order_id, [])
            about = f"{order_id} of {order.tenant} ({', '.join(sorted(order.answers)) or 'none'})"
            if not order.answers:
                if came:
                    yield f"{about} is no command, and was answered: {came}"
                continue
            if len(came) < times:
                yield f"{about} was written {times} times and answered {len(came)} times: {came}"
            elif came[0] not in order.answers:
                yield f"{about} was answered otherwise: {came}"
            elif set(came[1:]) - {REPEATED, CONFLICT}:
                yield f"{about} was decided again: {came}"
