"""The ledger: balances, lots and chain of entries, held against rows and what is published."""

import hashlib
from collections.abc import Iterator, Mapping, Set
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, Final

from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.prices import Tariffs, deck_of
from streams.testbed.auditor.records import PLAIN, Place, nanos, utc
from streams.testbed.auditor.rows import Rows
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import View

# What usage costs: money, or included minutes alone.
CHARGES: Final = ("charge", "pool")
# What brings the money of a payment.
CREDITS: Final = {"recharge", "purchase", "orphan"}
# What a result of each status can book; others move no money.
OF_RESULT: Final[Mapping[str, Set[str]]] = {
    "succeeded": CREDITS,
    "refunded": {"refund"},
    "dispute_opened": {"dispute_opened"},
    "dispute_won": {"dispute_won"},
    "dispute_lost": {"dispute_lost"},
}
_ZEROS: Final = bytes(32)
# For so long an expired lot may pay for usage of before.
_GRACE: Final = timedelta(hours=48)
# Entries that make a lot when they add money.
_MAKES: Final = {"purchase", "recharge", "orphan", "grant", "adjustment", "dispute_won"}


class Entry(Struct, gc=False):
    """What the audit keeps of a ledger entry."""

    tenant: str
    seq: int
    kind: str
    amount: int
    place: Place
    identity: tuple[str, str]
    payment: str | None
    at: datetime
    booked_at: datetime
    deck: tuple[str, str] | None
    links: dict[str, Any]
    pools: list[dict[str, Any]] = []
    recharge_id: str | None = None
    # Of what lots it takes or makes, and when the one that it makes ends.
    lots: tuple[str, ...] = ()
    ends: datetime | None = None

    @property
    def name(self) -> str:
        """What it is called in a verdict."""
        return f"{self.tenant}/{self.seq}"

    @property
    def minutes(self) -> int:
        """Included minutes that it took."""
        return sum(one["minutes"] for one in self.pools)


class Lot(Struct):
    """What the ledger says of a lot: what is left, when it ends, what was left when it did, and
    whether it was voided."""

    left: int = 0
    ends: datetime | None = None
    lapsed: int = 0
    void: bool = False

    def copy(self) -> "Lot":
        """As it is now."""
        return Lot(self.left, self.ends, self.lapsed, self.void)


class Fold(Struct):
    """A tenant's ledger, folded; `reopened` are lots that are over and have money by an event,
    `gone` lots that are empty: a correction may give something back to them."""

    seq: int = 0
    balance: int = 0
    overdraft: int = 0
    head: bytes = _ZEROS
    lots: dict[str, Lot] = {}
    cause: tuple[Any, ...] = ()
    reopened: set[str] = set()
    gone: dict[str, Lot] = {}

    def copy(self) -> "Fold":
        """As it is now."""
        lots = {name: lot.copy() for name, lot in self.lots.items()}
        gone = {name: lot.copy() for name, lot in self.gone.items()}
        return Fold(self.seq, self.balance, self.overdraft, self.head, lots, gone=gone)


class Ledger:
    """The entries of a partition: `folds` by tenant, `at_row` as they were when the row was
    written, `heads` where an earlier audit has ended, `entries` by the record that caused them."""

    def __init__(self, view: View, rows: Rows, tenants: Tenants, tariffs: Tariffs) -> None:
        self._view = view
        self._report = view.report
        self._rows = rows
        self._tenants = tenants
        self._tariffs = tariffs
        self.folds: dict[str, Fold] = {}
        self.at_row: dict[str, Fold] = {}
        self.entries: dict[Place, list[Entry]] = {}
        self.heads: dict[str, Fold] = {
            tenant: Fold(
                seq,
                int(balance),
                int(overdraft),
                bytes.fromhex(head),
                {
                    name: Lot(int(left), None if ends is None else utc(ends), int(lapsed), void)
                    for name, (left, ends, lapsed, void) in lots.items()
                },
            )
            for tenant, (seq, balance, overdraft, head, lots) in view.remembered(
                "tenants", {}
            ).items()
        }

    def head(self, tenant: str) -> Fold:
        """How far a tenant was when an earlier audit has ended."""
        return self.heads.get(tenant, Fold())

    def __iter__(self) -> Iterator[Entry]:
        """Every entry, those of one record together."""
        for entries in self.entries.values():
            yield from entries

    def judge(self) -> None:
        """Read all entries; they follow from one another and lead to the rows."""
        for record in self._view.records(topics.LEDGER):
            value = record.value or b""
            entry = PLAIN.decode(value)
            tenant = entry["tenant_id"]
            if not self._view.wanted(tenant):
                continue
            self._report.count("entries")
            self._view.judge_home(record, f"entry {tenant}/{entry['seq']}")
            if record.key != tenant.encode():
                self._report.violate("partition", f"the key of entry {tenant}/{entry['seq']}")
            fold = self.folds.get(tenant)
            if fold is None:
                fold = self.folds[tenant] = self.head(tenant).copy()
                self._note_row(tenant, fold)
            self._one_entry(tenant, fold, entry, value)
            self._note_row(tenant, fold)
        for tenant, fold in self.folds.items():
            self._settled(tenant, fold)
        self._compare_rows()

    def _one_entry(self, tenant: str, fold: Fold, entry: dict[str, Any], value: bytes) -> None:
        name = f"{tenant}/{entry['seq']}"
        if entry["seq"] != fold.seq + 1:
            self._report.violate("sequence", f"{name} follows {tenant}/{fold.seq}")
        body, _, rest = value.rpartition(b',"hash":"')
        head = hashlib.sha256(fold.head + body).digest()
        if rest != head.hex().encode() + b'"}':
            self._report.violate("chain", f"{name} does not hash to what it says")
        cause = entry["caused_by"]
        place = (cause["topic"], cause["partition"], cause["offset"])
        if fold.cause != (*place, cause["id"]):
            self._settled(tenant, fold)
            fold.cause = (*place, cause["id"])
        amount = nanos(entry["amount"])
        fold.seq = entry["seq"]
        fold.balance += amount
        if tenant not in self._tenants.known_since:
            self._tenants.known_since[tenant] = utc(entry["booked_at"])
        self._tenants.peaks[tenant] = max(self._tenants.peaks.get(tenant, 0), abs(fold.balance))
        fold.overdraft = nanos(entry.get("overdraft_after", "0"))
        fold.head = bytes.fromhex(entry["hash"])
        if nanos(entry["balance_after"]) != fold.balance:
            self._report.violate(
                "conservation",
                f"{name} says {entry['balance_after']} after it, the entries sum to "
                f"{Fraction(fold.balance, 10**9)}",
            )
        if self._tenants.differs(tenant, entry["currency"]):
            self._report.violate(
                "conservation",
                f"{name} is in {entry['currency']}, the account in "
                f"{self._tenants.currencies[tenant]}",
            )
        moved = sum(nanos(grant["amount"]) for grant in entry.get("grants", ()))
        if abs(moved) > abs(amount):
            self._report.violate("conservation", f"{name} moves grants by more than its amount")
        self._lots(name, fold, entry)
        kept = Entry(
            tenant,
            entry["seq"],
            entry["kind"],
            amount,
            place,
            (cause["source"], cause["id"]),
            entry.get("payment_id"),
            datetime.fromisoformat(entry["at"]),
            datetime.fromisoformat(entry["booked_at"]),
            deck_of(entry.get("rate")),
            entry.get("links") or {},
            entry.get("pools", []),
            entry.get("recharge_id"),
        )
        if kept.kind not in CHARGES:
            kept.lots = tuple(used["id"] for used in entry.get("grants", ()))
            kept.ends = None if entry.get("expires_at") is None else utc(entry["expires_at"])
        self.entries.setdefault(place, []).append(kept)
        if kept.kind in CHARGES:
            self._tariffs.judge_entry(name, entry["rate"], amount, kept.minutes)

    def _lots(self, name: str, fold: Fold, entry: dict[str, Any]) -> None:
        """Fold what an entry does to lots, and hold it against their ends."""
        kind, amount = entry["kind"], nanos(entry["amount"])
        at, booked_at = utc(entry["at"]), utc(entry["booked_at"])
        for used in entry.get("grants", ()):
            if used["id"] not in fold.lots:
                fold.lots[used["id"]] = fold.gone.pop(used["id"], Lot())
            lot = fold.lots[used["id"]]
            moved = nanos(used["amount"])
            lot.left += moved
            if lot.left != nanos(used["left"]) or lot.left < 0:
                self._bad_lot(name, f"leaves {used['left']} in {used['id']}, which it cannot have")
                lot.left = nanos(used["left"])
            over = lot.ends is not None and lot.ends <= at and lot.ends <= booked_at
            # A correction may charge what it has given back to a lot that is over.
            if over and moved < 0 and kind == "charge" and not entry.get("links"):
                self._bad_lot(name, f"is paid by {used['id']}, which had expired")
            if kind in ("expiry", "void") and lot.left:
                self._bad_lot(name, f"leaves something in {used['id']}")
            if kind == "void":
                lot.void = True
            elif kind == "reversal" and (lot.void or (lot.ends and lot.ends <= booked_at)):
                fold.reopened.add(used["id"])
            if kind == "expiry":
                lot.lapsed -= moved
                if lot.ends is None or lot.ends != at or booked_at < at:
                    self._bad_lot(name, f"ends {used['id']} at another time than its own")
            elif kind == "expiry_reopened":
                lot.lapsed -= moved
                fold.reopened.add(used["id"])
                late = lot.ends is None or at >= lot.ends or booked_at >= lot.ends + _GRACE
                if late or moved <= 0 or lot.lapsed < 0:
                    self._bad_lot(name, f"takes back from {used['id']} what had not expired")
        makes = kind in _MAKES or (kind == "reversal" and "expires_at" in entry)
        if makes and amount > 0 and entry.get("grants"):
            made = entry["grants"][-1]["id"]
            ends = entry.get("expires_at")
            fold.lots[made].ends = None if ends is None else utc(ends)
        for used in entry.get("grants", ()):
            known = fold.lots.get(used["id"])
            if known is not None and not known.left and not known.lapsed:
                fold.gone[used["id"]] = fold.lots.pop(used["id"])
        left = sum(lot.left for lot in fold.lots.values())
        if left - fold.overdraft != fold.balance:
            self._bad_lot(name, f"has {Fraction(left, 10**9)} in lots, which is not the balance")

    def _settled(self, tenant: str, fold: Fold) -> None:
        """What must hold between events."""
        for name in fold.reopened:
            if name in fold.lots and fold.lots[name].left:
                self._bad_lot(f"{tenant}/{fold.seq}", f"leaves money in {name}, which is over")
        fold.reopened = set()
        if fold.overdraft and any(lot.left for lot in fold.lots.values()):
            self._bad_lot(f"{tenant}/{fold.seq}", "leaves a lot beside an overdraft")

    def _bad_lot(self, name: str, what: str) -> None:
        self._report.violate("lots", f"{name} {what}")

    def _note_row(self, tenant: str, fold: Fold) -> None:
        row = self._rows.of_tenant.get(tenant)
        if row is not None and row[3] == fold.seq:
            self.at_row[tenant] = fold.copy()

    def _compare_rows(self) -> None:
        for tenant, row in self._rows.of_tenant.items():
            if not self._view.wanted(tenant):
                continue
            _, _, _, seq, head, overdraft, grants, *_ = row
            fold = self.at_row.get(tenant)
            if fold is None and tenant in self.heads and self.heads[tenant].seq == seq:
                fold = self.heads[tenant]
            if fold is None and seq == 0:
                fold = Fold()
            if fold is None:
                last = self.folds.get(tenant, Fold()).seq
                self._report.violate(
                    "changelog", f"the row of {tenant} is at seq {seq}, its ledger ends at {last}"
                )
                continue
            if bytes(head) != fold.head:
                self._report.violate("changelog", f"the row of {tenant} has another chain head")
            balance = sum(grant[4] for grant in grants) - overdraft
            if balance != fold.balance or overdraft != fold.overdraft:
                self._report.violate(
                    "conservation",
                    f"the row of {tenant} holds {Fraction(balance, 10**9)}, its entries sum to "
                    f"{Fraction(fold.balance, 10**9)}",
                )
            if any(grant[4] < 0 for grant in grants):
                self._report.violate("conservation", f"a grant of {tenant} is below zero")
            left = {name: lot.left for name, lot in fold.lots.items() if lot.left}
            if {grant[0]: grant[4] for grant in grants} != left:
                self._bad_lot(f"the row of {tenant}", "has other lots than its entries made")
        for tenant in self.folds.keys() - self._rows.of_tenant.keys():
            if any(
                self._view.below(place)
                for place, entries in self.entries.items()
                if entries[0].tenant == tenant
            ):
                self._report.violate("changelog", f"{tenant} has entries but no row")

    def judge_balances(self) -> dict[str, dict[str, Any]]:
        """What was published last of each tenant, which must be what its entries sum to."""
        latest: dict[str, dict[str, Any]] = {}
        for record in self._view.records(topics.BALANCE):
            self._view.judge_home(record, "balance")
            if record.value is not None:
                public = PLAIN.decode(record.value)
                latest[public["tenant_id"]] = public
        for tenant, public in latest.items():
            if not self._view.wanted(tenant):
                continue
            judge_available(self._report, f"the balance of {tenant}", public)
            if self._tenants.differs(tenant, public.get("currency")):
                self._report.violate(
                    "conservation", f"the balance of {tenant} is published in another currency"
                )
            for fold in (self.at_row.get(tenant), self.folds.get(tenant)):
                if fold is not None and fold.seq == public["seq"]:
                    if nanos(public["balance"]) != fold.balance:
                        self._report.violate(
                            "conservation",
                            f"the balance of {tenant} is published as {public['balance']}",
                        )
                    if public["hash"] != fold.head.hex():
                        self._report.violate("chain", f"the published head of {tenant}")
        # A later one may have been the end of it, where the topic is compacted.
        later = {one.key for one in self._view.later(topics.BALANCE)}
        for tenant in self._rows.of_tenant:
            known = tenant in latest or self._view.options.checkpoint_from is not None
            if self._view.wanted(tenant) and not known and tenant.encode() not in later:
                self._report.violate("conservation", f"no balance of {tenant} is published")
        return {tenant: public for tenant, public in latest.items() if self._view.wanted(tenant)}

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        tenants = {**self.heads, **self.folds}
        return {
            "tenants": {
                tenant: [
                    fold.seq,
                    str(fold.balance),
                    str(fold.overdraft),
                    fold.head.hex(),
                    {
                        name: [
                            str(lot.left),
                            None if lot.ends is None else lot.ends.isoformat(),
                            str(lot.lapsed),
                            lot.void,
                        ]
                        for name, lot in (*fold.gone.items(), *fold.lots.items())
                    },
                ]
                for tenant, fold in tenants.items()
            }
        }


def judge_available(report: Report, what: str, public: Mapping[str, Any]) -> None:
    """What is published as available is the balance without the exposure."""
    if "available" not in public:
        return
    exposure = nanos(public.get("exposure", "0"))
    if exposure < 0 or nanos(public["available"]) != nanos(public["balance"]) - exposure:
        report.violate("holds", f"{what} has {public['available']} available")
