"""Statements: a tenant's entries of a period, footed, with what proves that nothing was changed.

A statement is CSV (RFC 4180). Its first row opens with the balance and the chain's hash before the
period, its last row closes with those after it. Every entry's row ends with the entry as it was
published, byte for byte: whoever kept an earlier statement, or only its last hash, can check
without us that the chain still leads from there to here.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas.nanos import nanos_from, text_from

COLUMNS: Final = (
    "row",
    "tenant_id",
    "seq",
    "booked_at",
    "at",
    "kind",
    "description",
    "amount",
    "balance_after",
    "currency",
    "hash",
    "record",
)
OPENING: Final = "opening"
ENTRY: Final = "entry"
CLOSING: Final = "closing"
NO_HASH: Final = "0" * 64
_HASH: Final = b',"hash":"'
# What a spreadsheet would run as a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
_DESCRIBED: Final = ("usage_kind", "callee", "recharge_id", "payment_id", "reason")
_EMPTY: Final = ("at", "kind", "description", "record")
# A statement that names more faults than this helps nobody.
MOST_FAULTS: Final = 20


class StatementError(Exception):
    """The text is no statement; the message says why."""


class Checked(Struct, frozen=True, kw_only=True):
    """What became of a check. `earlier` says whether the earlier head is in the chain; None when
    none was given, or when the statement does not reach to it."""

    tenant_id: str
    entries: int
    opening_seq: int
    closing_seq: int
    opening_balance: str
    closing_balance: str
    currency: str
    head: str
    earlier: bool | None
    faults: list[str]


def compose(
    tenant_id: str,
    currency: str,
    values: Iterable[bytes],
    *,
    since: datetime | None = None,
    until: datetime | None = None,
) -> str:
    """A statement of what was booked in [since, until), from all of a tenant's entries in order.

    Same entries, same bytes.
    """
    before: dict[str, Any] = {"seq": 0, "balance_after": "0", "hash": NO_HASH, "booked_at": ""}
    last = before
    rows: list[list[str]] = []
    total_nanos = 0
    for value in values:
        entry = msgspec.json.decode(value)
        booked_at = datetime.fromisoformat(entry["booked_at"])
        if since is not None and booked_at < since:
            before = last = entry
            continue
        if until is not None and booked_at >= until:
            break
        total_nanos += nanos_from(entry["amount"])
        last = entry
        rows.append(_row(entry, value))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    begins = before["booked_at"] if since is None else since.isoformat()
    ends = last["booked_at"] if until is None else until.isoformat()
    writer.writerow(_bound(OPENING, tenant_id, before, begins, "0", currency))
    writer.writerows(rows)
    writer.writerow(_bound(CLOSING, tenant_id, last, ends, text_from(total_nanos), currency))
    return text.getvalue()


def _bound(
    row: str, tenant_id: str, entry: dict[str, Any], at: str, amount: str, currency: str
) -> list[str]:
    balance = entry["balance_after"]
    return [
        *(row, tenant_id, str(entry["seq"]), at, "", "", "", amount, balance, currency),
        *(entry["hash"], ""),
    ]


def _row(entry: dict[str, Any], value: bytes) -> list[str]:
    said = [str(entry[name]) for name in _DESCRIBED if entry.get(name)]
    taken = entry.get("pools")
    if isinstance(taken, list):
        said += [
            f"{one.get('minutes')} min {one.get('pool')}" for one in taken if isinstance(one, dict)
        ]
    if entry.get("links"):
        said.append(f"corrects {entry['links']['corrects']}")
    described = " ".join(said)
    return [
        ENTRY,
        entry["tenant_id"],
        str(entry["seq"]),
        entry["booked_at"],
        entry["at"],
        entry["kind"],
        f"'{described}" if described.startswith(_FORMULA) else described,
        entry["amount"],
        entry["balance_after"],
        entry["currency"],
        entry["hash"],
        value.decode(),
    ]


def ends_with(statement: str) -> tuple[int, str]:
    """The number and hash a statement closes with. Raises StatementError."""
    closing = _read(statement)[-1]
    return _whole(closing["seq"]), closing["hash"]


def check(statement: str, *, earlier: tuple[int, str] | str | None = None) -> Checked:
    """Check a statement by itself: numbers, sums, columns, and the chain on raw bytes.

    `earlier` is the head kept from before: a hash, or a number and a hash. Raises StatementError
    when the text is no statement.
    """
    rows = _read(statement)
    opening, entries, closing = rows[0], rows[1:-1], rows[-1]
    faults: list[str] = []
    seq, head = _whole(opening["seq"]), opening["hash"]
    balance_nanos = _nanos(opening["balance_after"])
    opened_nanos = balance_nanos
    heads = {head: seq}
    for row in entries:
        value = row["record"].encode()
        seq += 1
        body, _, rest = value.rpartition(_HASH)
        head = sha256(_bytes_of(head) + body).hexdigest()
        heads[head] = seq
        where = f"entry {row['seq']}"
        if rest != head.encode() + b'"}':
            faults.append(f"{where}: the hash does not follow from the entry before it")
            # Go on from what it says, so that one fault is told once.
            head = row["hash"]
        entry = _entry(value, where)
        if entry.get("seq") != seq:
            faults.append(f"{where}: number {seq} is missing")
            seq = entry.get("seq", seq) if isinstance(entry.get("seq"), int) else seq
        if _row(entry, value) != [row[name] for name in COLUMNS]:
            faults.append(f"{where}: a column does not say what its record says")
        if entry["tenant_id"] != opening["tenant_id"] or entry["currency"] != opening["currency"]:
            faults.append(f"{where}: of another tenant or currency")
        balance_nanos += _nanos(entry["amount"])
        if balance_nanos != _nanos(entry["balance_after"]):
            faults.append(f"{where}: the amounts do not sum to the balance after it")
            balance_nanos = _nanos(entry["balance_after"])
    if (_whole(closing["seq"]), closing["hash"]) != (seq, head):
        faults.append("closing: it does not name the last entry and its hash")
    if _nanos(closing["balance_after"]) != balance_nanos:
        faults.append("closing: the balance is not that after the last entry")
    if _nanos(closing["amount"]) != balance_nanos - opened_nanos:
        faults.append("closing: the sum of the amounts is another")
    if any(opening[name] != closing[name] for name in ("tenant_id", "currency")):
        faults.append("closing: of another tenant or currency than the opening")
    if opening["amount"] != "0" or any(row[name] for row in (opening, closing) for name in _EMPTY):
        faults.append("opening or closing: a cell is filled that belongs to entries")
    if opening["seq"] == "0" and (opening["hash"], opened_nanos) != (NO_HASH, 0):
        faults.append("opening: before the first entry there is no balance and no hash")
    return Checked(
        tenant_id=opening["tenant_id"],
        entries=len(entries),
        opening_seq=_whole(opening["seq"]),
        closing_seq=seq,
        opening_balance=opening["balance_after"],
        closing_balance=closing["balance_after"],
        currency=opening["currency"],
        head=head,
        earlier=_found(earlier, heads, _whole(opening["seq"]), seq),
        faults=faults[:MOST_FAULTS],
    )


def _found(
    earlier: tuple[int, str] | str | None, heads: dict[str, int], opening_seq: int, closing_seq: int
) -> bool | None:
    if earlier is None:
        return None
    if isinstance(earlier, str):
        return earlier in heads
    seq, head = earlier
    if not opening_seq <= seq <= closing_seq:
        return None
    return heads.get(head) == seq


def _read(statement: str) -> list[dict[str, str]]:
    try:
        lines: Sequence[list[str]] = list(
            csv.reader(io.StringIO(statement, newline=""), strict=True)
        )
    except csv.Error as error:
        raise StatementError(f"it is no CSV: {error}") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise StatementError("its first line does not name the columns of a statement")
    if any(len(line) != len(COLUMNS) for line in lines):
        raise StatementError("a line has too few or too many cells")
    rows = [dict(zip(COLUMNS, line, strict=True)) for line in lines[1:]]
    kinds = [row["row"] for row in rows]
    if len(rows) < 2 or kinds != [OPENING, *[ENTRY] * (len(rows) - 2), CLOSING]:
        raise StatementError("it has no opening row, entries and closing row, in this order")
    return rows


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise StatementError(f"{text!r} is no number of an entry")
    return int(text)


def _nanos(text: Any) -> int:
    try:
        return nanos_from(text)
    except (ValueError, TypeError):
        raise StatementError(f"{text!r} is no amount") from None


def _bytes_of(head: str) -> bytes:
    try:
        found = bytes.fromhex(head)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise StatementError(f"{head!r} is no hash")
    return found


def _entry(value: bytes, where: str) -> dict[str, Any]:
    try:
        entry = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StatementError(f"{where}: its record is no JSON") from None
    names = ("tenant_id", "seq", "booked_at", "at", "kind", "amount", "balance_after", "currency")
    if not isinstance(entry, dict) or not all(name in entry for name in (*names, "hash")):
        raise StatementError(f"{where}: its record is no entry")
    return entry
