"""The account: one tenant's row as the core sees it, and rows as bytes.

Rows are msgpack arrays behind eight bytes that say when the row wants to be looked at again. A row
carries its version; an older one is lifted when it is read, a newer one is refused.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, TypeVar, final

import msgspec
from msgspec.structs import astuple
from mypy_extensions import mypyc_attr

from schemas.notices import Withheld
from streams.billing.parts import (
    AHEAD,
    VERSION,
    AccountRow,
    Asked,
    Assignment,
    Grant,
    Hold,
    Licensed,
    Payment,
    Period,
    Planned,
    Policy,
    Recharging,
    Spent,
    UnpaidFund,
    Watch,
    forgotten_at,
    overdue_at,
)

_IN_FLIGHT: Final = Withheld.IN_FLIGHT
NEVER: Final = b"\xff" * 8
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class NewerRowError(Exception):
    """The row was written by a newer version of this program, which must read it."""


@final
@mypyc_attr(acyclic=True)
class Standing:
    """What nearly every charge leaves as it is, so that an account shares it with the one before:
    the members of an `AccountRow` but those of `Account`, and what they come to.

    While the balance is above `quiet_above_nanos` and below `quiet_below_nanos`, a charge that
    leaves the standing alone has nothing to ask for and nothing to tell. `due` is when time alone
    will change it. `tail` are its bytes in a row, once they were needed.
    """

    __slots__ = (
        "alert_levels",
        "billing_from",
        "closed_at",
        "decks",
        "due",
        "exposure_nanos",
        "former",
        "funds",
        "holds",
        "holds_told",
        "lapsed",
        "opened_at",
        "overdraft_floor_nanos",
        "payment_methods",
        "planned",
        "policy",
        "pools",
        "quiet_above_nanos",
        "quiet_below_nanos",
        "recharging",
        "settings_version",
        "spent",
        "tail",
        "time_zone",
        "unpaid_funds",
        "version",
        "watch",
    )

    def __init__(
        self,
        version: int,
        opened_at: datetime,
        billing_from: datetime,
        closed_at: datetime | None,
        time_zone: str,
        settings_version: int,
        overdraft_floor_nanos: int,
        policy: Policy,
        payment_methods: tuple[str, ...],
        recharging: Recharging,
        funds: tuple[Asked, ...],
        unpaid_funds: tuple[UnpaidFund, ...],
        former: tuple[Period, ...],
        decks: tuple[Assignment, ...],
        watch: Watch,
        planned: tuple[Planned, ...],
        lapsed: tuple[Grant, ...],
        alert_levels: tuple[int, ...],
        spent: tuple[Spent, ...],
        pools: tuple[Licensed, ...],
        exposure_nanos: int,
        holds: int,
        holds_told: bool,
    ) -> None:
        self.version = version
        self.opened_at = opened_at
        self.billing_from = billing_from
        self.closed_at = closed_at
        self.time_zone = time_zone
        self.settings_version = settings_version
        self.overdraft_floor_nanos = overdraft_floor_nanos
        self.policy = policy
        self.payment_methods = payment_methods
        self.recharging = recharging
        self.funds = funds
        self.unpaid_funds = unpaid_funds
        self.former = former
        self.decks = decks
        self.watch = watch
        self.planned = planned
        self.lapsed = lapsed
        self.alert_levels = alert_levels
        self.spent = spent
        self.pools = pools
        self.exposure_nanos = exposure_nanos
        self.holds = holds
        self.holds_told = holds_told
        self.tail: bytes | None = None
        self.due = self._due()
        self.quiet_above_nanos = watch.fall_nanos
        self.quiet_below_nanos = watch.rise_nanos
        trigger_nanos = policy.trigger_nanos + exposure_nanos
        withheld = recharging.withheld
        if withheld is None and recharging.stage == "idle":
            self.quiet_above_nanos = max(self.quiet_above_nanos, trigger_nanos)
        elif withheld is _IN_FLIGHT:
            # Told already: the guards would say it again.
            self.quiet_below_nanos = min(self.quiet_below_nanos, trigger_nanos)
        else:
            self.quiet_above_nanos = self.quiet_below_nanos  # look at everything

    def members(self) -> tuple[Any, ...]:
        """What a row says of it behind the grants, in the row's order."""
        return (
            self.opened_at,
            self.billing_from,
            self.closed_at,
            self.time_zone,
            self.settings_version,
            self.overdraft_floor_nanos,
            self.policy,
            self.payment_methods,
            self.recharging,
            self.funds,
            self.unpaid_funds,
            self.former,
            self.decks,
            self.watch,
            self.planned,
            self.lapsed,
            self.alert_levels,
            self.spent,
            self.pools,
            self.exposure_nanos,
            self.holds,
            self.holds_told,
        )

    def _due(self) -> datetime | None:
        recharging = self.recharging
        due = _earlier(recharging.until, recharging.opens_at)
        due = _earlier(due, self.watch.renew_at)
        for planned in self.planned:
            due = _earlier(due, planned.at)
        for lapsed in self.lapsed:
            due = _earlier(due, forgotten_at(lapsed))
        if self.closed_at is None:
            if recharging.asked is not None:
                due = _earlier(due, overdue_at(recharging.asked))
            for fund in self.funds:
                due = _earlier(due, overdue_at(fund))
        return due


@final
@mypyc_attr(acyclic=True)
class Account:
    """One tenant: what every charge changes, and its standing. `balance_nanos` is what is left in
    the active grants, minus what was overdrawn.

    A class and not a struct (see `events`), which nobody changes once it is made.
    """

    __slots__ = (
        "balance_nanos",
        "currency",
        "grants",
        "head",
        "overdraft_nanos",
        "seq",
        "standing",
        "tenant_id",
    )

    def __init__(
        self,
        tenant_id: str,
        currency: str,
        seq: int,
        head: bytes,
        overdraft_nanos: int,
        grants: tuple[Grant, ...],
        standing: Standing,
    ) -> None:
        self.tenant_id = tenant_id
        self.currency = currency
        self.seq = seq
        self.head = head
        self.overdraft_nanos = overdraft_nanos
        self.grants = grants
        self.standing = standing
        balance_nanos = -overdraft_nanos
        for grant in grants:
            balance_nanos += grant.left_nanos
        self.balance_nanos = balance_nanos

    def members(self) -> tuple[Any, ...]:
        """What its row says, in the row's order."""
        return (
            self.standing.version,
            self.tenant_id,
            self.currency,
            self.seq,
            self.head,
            self.overdraft_nanos,
            self.grants,
            *self.standing.members(),
        )

    def changed(self, **members: Any) -> "Account":
        """The same account with other members of its row."""
        values = list(self.members())
        for name, value in members.items():
            values[_PLACES[name]] = value
        return _account(values)

    def booked(
        self, seq: int, head: bytes, overdraft_nanos: int, grants: tuple[Grant, ...]
    ) -> "Account":
        """The same account with one entry more."""
        return Account(
            self.tenant_id, self.currency, seq, head, overdraft_nanos, grants, self.standing
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Account) and self.members() == other.members()

    def __repr__(self) -> str:
        return repr(AccountRow(**dict(zip(_PLACES, self.members(), strict=True))))

    @property
    def state(self) -> str:
        """The label of `credits_tenants`: the recharge stage, or closed."""
        standing = self.standing
        return standing.recharging.stage if standing.closed_at is None else "closed"

    def next_due(self) -> datetime | None:
        """When time alone will change this account; None when it will not."""
        due = self.standing.due
        for grant in self.grants:
            at = grant.expires_at
            if at is not None:
                warnings = grant.warnings
                if warnings:
                    at -= AHEAD[warnings]
                if due is None or at < due:
                    due = at
        return due


# Where a row has which member.
_PLACES: Final = {name: place for place, name in enumerate(AccountRow.__struct_fields__)}


# Those of a standing begin here, behind the version and those of an account.
_STANDING: Final = 7


def account_from(row: AccountRow) -> Account:
    """The account a row holds."""
    return _account(astuple(row))


def _account(values: Sequence[Any]) -> Account:
    version, tenant_id, currency, seq, head, overdraft_nanos, grants = values[:_STANDING]
    standing = Standing(version, *values[_STANDING:])
    return Account(tenant_id, currency, seq, head, overdraft_nanos, grants, standing)


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


_encode: Final = msgspec.msgpack.Encoder().encode
# How msgpack begins an array as long as a row. What is encoded alone has a shorter beginning, which
# gives way: one byte before the members up to the grants, three before the others.
_ARRAY: Final = b"\xdc" + len(_PLACES).to_bytes(2, "big")


def _due_bytes(due: datetime | None) -> bytes:
    if due is None:
        return NEVER
    # As `parts.microseconds`, which is not compiled.
    return ((due - _EPOCH) // _MICROSECOND).to_bytes(8, "big")


def encode_row(account: Account) -> bytes:
    """A tenant's row as the changelog keeps it."""
    standing = account.standing
    tail = standing.tail
    if tail is None:
        tail = standing.tail = _encode(standing.members())[3:]
    head = _encode(
        (
            standing.version,
            account.tenant_id,
            account.currency,
            account.seq,
            account.head,
            account.overdraft_nanos,
            account.grants,
        )
    )
    return b"%b%b%b%b" % (_due_bytes(account.next_due()), _ARRAY, head[1:], tail)


def encode_payment(payment: Payment) -> bytes:
    """A payment's row; it is due when it may be forgotten."""
    return _due_bytes(payment.kept_until) + _encode(payment)


def encode_hold(hold: Hold) -> bytes:
    """A hold's row; it is due when it dies, or when its leg's end may be forgotten."""
    return _due_bytes(hold.until) + _encode(hold)


def _check_version(value: bytes) -> None:
    members = msgspec.msgpack.decode(memoryview(value)[8:])
    version = members[0] if isinstance(members, list) and members else None
    if isinstance(version, int) and version > VERSION:
        raise NewerRowError(
            f"a row of version {version}, this program writes version {VERSION}: upgrade it first"
        )


class _Row(Protocol):
    @property
    def version(self) -> int: ...


_R = TypeVar("_R", bound=_Row)


def _reader(kind: type[_R]) -> Callable[[bytes], _R]:
    decode = msgspec.msgpack.Decoder(kind).decode

    def read(value: bytes) -> _R:
        try:
            row = decode(memoryview(value)[8:])
        except msgspec.ValidationError:
            _check_version(value)
            raise
        if row.version > VERSION:
            _check_version(value)
        return row

    return read


_decode_account: Final = _reader(AccountRow)
# Read a payment's row, or a hold's. Each raises NewerRowError, msgspec.DecodeError.
decode_payment: Final = _reader(Payment)
decode_hold: Final = _reader(Hold)


def decode_row(value: bytes) -> Account:
    """Read a tenant's row. Raises NewerRowError, msgspec.DecodeError."""
    return account_from(_decode_account(value))
