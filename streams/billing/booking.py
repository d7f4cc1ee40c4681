"""The books while one event is applied: what it moves, and all there is to announce.

A draft is made for one event and ends as an `Outcome`; it never leaves `ledger.apply`.
"""

from binascii import hexlify
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, final

import msgspec
from msgspec.structs import replace
from mypy_extensions import mypyc_attr

from schemas.funding import RechargeRequest
from schemas.ledger import EntryKind, GrantUsed, LedgerEntry, RateUsed
from schemas.nanos import text_from
from schemas.notices import DeadLetterReason, Notice, NoticeKind, Withheld
from streams.billing import grants
from streams.billing.account import Account
from streams.billing.events import Cause
from streams.billing.money import MAX_BALANCE_NANOS
from streams.billing.outcomes import Burnt, Outcome, Refused
from streams.billing.parts import Grant, Hold, LotKind, Payment

# Bought money expires twelve months after purchase, as Microsoft's Communications Credits do.
PAID_MONTHS: Final = 12
DEFAULT_PRIORITY: Final = 100

_NOTHING: Final[Mapping[str, Any]] = {}
# What an entry of usage says of it: the members of `LedgerEntry` from `usage_kind` to `rate`.
Told = tuple[str | None, str | None, str | None, bool, bool, RateUsed | None]
NO_USAGE: Final[Told] = (None, None, None, False, False, None)
# A name of another module is looked up anew each time, one of this module is not.
_GrantUsed: Final = GrantUsed
_LedgerEntry: Final = LedgerEntry
_replace: Final = replace
_hex: Final = hexlify
# Far within the range: compiled code compares longer numbers ten times as slowly.
_SHORT: Final = 2**61
_encode_into: Final = msgspec.json.Encoder().encode_into
# An entry is written here, for a buffer of its own would grow five times.
_entry: Final = bytearray()
# A copy costs less than to ask for the algorithm by its name each time.
_sha256: Final = sha256()
# Calls cost the same few amounts again and again; balances never.
_amount_text: Final = lru_cache(maxsize=8_192)(text_from)


class RefusedError(Exception):
    """Raised inside the core to leave a draft; `refused` says why. Nothing of it is kept."""

    def __init__(
        self, reason: DeadLetterReason, path: str = "", exposure_nanos: int | None = None
    ) -> None:
        super().__init__(reason.value, path)
        self.refused = Refused(reason, path, exposure_nanos)


class CommandRefusedError(Exception):
    """The command is refused: `rule` names why, `fix` says in a sentence what to do."""

    def __init__(self, rule: str, fix: str) -> None:
        super().__init__(rule)
        self.rule = rule
        self.fix = fix


def months_later(at: datetime, months: int) -> datetime:
    """The same day and time some months on; the month's last day when it is shorter."""
    years, month = divmod(at.month - 1 + months, 12)
    year = at.year + years
    for day in range(at.day, 27, -1):
        try:
            return at.replace(year=year, month=month + 1, day=day)
        except ValueError:
            continue
    return at.replace(year=year, month=month + 1)


@final
@mypyc_attr(acyclic=True)
class Draft:
    """One event's effect on one account, being worked out."""

    __slots__ = (
        "account",
        "balance_nanos",
        "before",
        "cause",
        "entries",
        "hold",
        "moved",
        "notices",
        "now",
        "payment",
        "requests",
        "withheld",
    )

    def __init__(self, account: Account, cause: Cause, now: datetime) -> None:
        self.before = account
        self.account = account
        # By the entries; that the lots come to the same is a law (see `check_books`).
        self.balance_nanos = account.balance_nanos
        self.cause = cause
        self.now = now
        # Tuples, not lists: nearly every event adds one entry and nothing else.
        self.entries: tuple[bytes, ...] = ()
        self.moved: tuple[tuple[EntryKind, int], ...] = ()
        self.requests: tuple[RechargeRequest, ...] = ()
        self.notices: tuple[Notice, ...] = ()
        self.payment: Payment | None = None
        self.hold: Hold | None = None
        self.withheld: Withheld | None = None

    @property
    def caused_by(self) -> str:
        """The event in one word, for notices and requests."""
        return f"{self.cause.source}/{self.cause.id}"

    def book(
        self,
        kind: EntryKind,
        amount_nanos: int,
        burnt: Burnt,
        at: datetime,
        details: Mapping[str, Any] = _NOTHING,
        told: Told = NO_USAGE,
    ) -> None:
        """Write one ledger entry: `amount_nanos` is what the balance changes by, `details` are
        members of the entry that only its kind has, `told` those of usage.

        Raises RefusedError(`overflow`) when the balance would leave the range a row can hold.
        """
        account = self.account
        seq = account.seq + 1
        balance_nanos = self.balance_nanos + amount_nanos
        if not -_SHORT < balance_nanos < _SHORT and abs(balance_nanos) > MAX_BALANCE_NANOS:
            raise RefusedError(DeadLetterReason.OVERFLOW)
        amount = _amount_text(amount_nanos)
        balance = text_from(balance_nanos)
        # Most entries touch the only grant: then both texts are there already.
        used = [
            _GrantUsed(
                grant.id,
                amount if nanos == amount_nanos else text_from(nanos),
                balance if grant.left_nanos == balance_nanos else text_from(grant.left_nanos),
            )
            for grant, nanos in burnt.touched
        ]
        overdraft = text_from(burnt.overdraft_nanos) if burnt.overdraft_nanos else "0"
        kind_used, call_id, callee, late, disagrees, rate = told
        # By position: more than fifteen names in one call cost six times as much.
        entry = _LedgerEntry(
            account.tenant_id,
            seq,
            kind,
            amount,
            account.currency,
            balance,
            at,
            self.now,
            self.cause,
            overdraft,
            used,
            kind_used,
            call_id,
            callee,
            late,
            disagrees,
            rate,
        )
        if details:
            entry = _replace(entry, **details)
        # The hash is the last member and covers the bytes before it, so that anybody can check
        # a chain on raw bytes without re-encoding anything.
        _encode_into(entry, _entry)
        _entry.pop()
        hashed = _sha256.copy()
        chained = account.head + _entry
        hashed.update(chained)
        head = hashed.digest()
        self.entries += (b'%b,"hash":"%b"}' % (chained[len(head) :], _hex(head)),)
        self.moved += ((kind, amount_nanos),)
        self.balance_nanos = balance_nanos
        self.account = account.booked(seq, head, burnt.overdraft_nanos, burnt.grants)
        if len(burnt.grants) < len(account.grants):
            void = kind is EntryKind.VOID
            self.account = grants.with_spent(self.account, account.grants, self.now, void=void)

    def new_lot(
        self,
        amount_nanos: int,
        kind: LotKind = LotKind.PAID,
        expires_at: datetime | None = None,
    ) -> Grant:
        """A lot that begins now, named after the entry that is booked next."""
        if expires_at is None:
            expires_at = months_later(self.now, PAID_MONTHS)
        return Grant(
            id=f"g{self.account.seq + 1}",
            kind=kind,
            priority=DEFAULT_PRIORITY,
            amount_nanos=amount_nanos,
            left_nanos=amount_nanos,
            effective_at=self.now,
            expires_at=expires_at,
            created_at=self.now,
            warnings=grants.warnings_left(expires_at, self.now),
        )

    def credit(
        self,
        kind: EntryKind,
        amount_nanos: int,
        *,
        grant_kind: LotKind = LotKind.PAID,
        expires_at: datetime | None = None,
        details: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Put money in: a new lot, after it has paid what was overdrawn."""
        self.put_in(kind, self.new_lot(amount_nanos, grant_kind, expires_at), self.now, details)

    def put_in(
        self, kind: EntryKind, grant: Grant, at: datetime, details: Mapping[str, Any] = _NOTHING
    ) -> None:
        """Put a lot in; one whose id is there already is set back to what this one has. It first
        pays what was overdrawn. Money that came is never refused: a full row makes room."""
        known = any(one.id == grant.id for one in self.account.grants)
        merged: tuple[tuple[Grant, int], ...] = ()
        if not known and grants.lots_of(self.account) >= grants.MOST_LOTS:
            self.account, merged = grants.make_room(self.account)
        burnt, amount_nanos = grants.set_back(self.account, grant)
        if merged:
            burnt = Burnt(burnt.grants, burnt.overdraft_nanos, merged + burnt.touched)
        self.book(kind, amount_nanos, burnt, at, {"expires_at": grant.expires_at, **details})
        if self.account.standing.spent:
            self.account = grants.trimmed(self.account)

    def debit(
        self,
        kind: EntryKind,
        amount_nanos: int,
        at: datetime,
        details: Mapping[str, Any] = _NOTHING,
        first: Mapping[str, int] | None = None,
        told: Told = NO_USAGE,
    ) -> None:
        """Take money out, below zero if need be: what happened, happened. The lots in `first` pay
        before any other, dead or alive, so much each; then the rest of what had expired stays where
        it is."""
        if first:
            burnt = grants.burn_first(self.account, first, amount_nanos, at, self.now)
        else:
            if self.account.standing.lapsed:
                self._reopen(amount_nanos, at)
            burnt = grants.burn(self.account, amount_nanos, at, self.now)
        self.book(kind, -amount_nanos, burnt, at, details, told)

    def _reopen(self, amount_nanos: int, at: datetime) -> None:
        """Usage of before a lot's expiry has come late: the expiry is taken back for exactly what
        the usage needs of the lot."""
        for lapsed, nanos in grants.reopened(self.account, amount_nanos, at, self.now):
            rest = replace(lapsed, left_nanos=lapsed.left_nanos - nanos)
            kept = tuple(
                rest if one is lapsed else one
                for one in self.account.standing.lapsed
                if one is not lapsed or rest.left_nanos
            )
            self.account = self.account.changed(lapsed=kept)
            lot = replace(lapsed, left_nanos=nanos)
            burnt = Burnt(
                grants.ordered((*self.account.grants, lot)),
                self.account.overdraft_nanos,
                ((lot, nanos),),
            )
            details = {"expires_at": lapsed.expires_at}
            self.book(EntryKind.EXPIRY_REOPENED, nanos, burnt, at, details)

    def note(
        self,
        kind: EntryKind,
        at: datetime,
        details: Mapping[str, Any] = _NOTHING,
        told: Told = NO_USAGE,
    ) -> None:
        """Write an entry of what moves no money."""
        account = self.account
        self.book(kind, 0, Burnt(account.grants, account.overdraft_nanos, ()), at, details, told)

    @property
    def available_nanos(self) -> int:
        """The balance without what open calls hold."""
        return self.balance_nanos - self.account.standing.exposure_nanos

    def exposed(self) -> dict[str, str]:
        """What a notice about the balance says of open calls, when there are any."""
        exposure_nanos = self.account.standing.exposure_nanos
        if not exposure_nanos:
            return {}
        return {
            "available": text_from(self.available_nanos),
            "exposure": text_from(exposure_nanos),
        }

    def notify(self, notice: NoticeKind, **details: Any) -> None:
        """Announce something to people."""
        self.notices += (
            Notice(
                notice=notice,
                tenant_id=self.account.tenant_id,
                at=self.now,
                caused_by=self.caused_by,
                **details,
            ),
        )

    def check_books(self) -> None:
        """The law after every event; a breach is a defect of ours, never the event's fault."""
        before, after = self.before, self.account
        if before is after:
            return
        assert after.balance_nanos == self.balance_nanos, "entries do not sum to the balance"
        assert after.seq == before.seq + len(self.entries), "an entry without its number"
        if after.overdraft_nanos:
            assert after.overdraft_nanos > 0
            assert not any(grants.active(grant, self.now) for grant in after.grants), (
                "overdrawn beside a lot that could pay"
            )

    def outcome(self, label: str) -> Outcome:
        """What the event did."""
        return Outcome(
            self.account,
            label,
            self.entries,
            self.moved,
            self.requests,
            self.notices,
            self.payment,
            None,
            self.withheld,
            self.hold,
        )
