"""Statements foot, and prove that nothing was changed since an earlier one."""

import csv
import io
from datetime import timedelta
from functools import cache
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.commands import Adjustment
from schemas.money import Money
from streams.billing import statement
from streams.billing.statement import StatementError, check, compose, ends_with
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_command,
    a_payment,
    an_account,
    apply,
    minutes,
    opening,
)

MONTH = timedelta(days=30)


def a_book() -> Book:
    """Two months of movements."""
    book = Book()
    book.feed(a_command(opening(opening_balance="10")))
    book.feed(minutes(4))
    book.feed(a_command(a_payment("50")), NOW + timedelta(days=1))
    later = NOW + MONTH
    book.feed(a_call(started_at=later, duration_s=90), later)
    book.feed(a_command(a_payment("75", "wire-2")), later)
    return book


def of(book: Book, **period: object) -> str:
    return compose("t-1", "USD", book.entries, **period)  # type: ignore[arg-type]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_statement_foots_to_the_balance_and_ends_with_the_chains_head() -> None:
    book = a_book()
    assert book.account is not None
    checked = check(of(book))
    assert checked.faults == []
    assert (checked.opening_balance, checked.closing_balance) == ("0", "129")
    assert (checked.closing_seq, checked.head) == (book.account.seq, book.account.head.hex())
    closing = rows(of(book))[-1]
    assert (closing["amount"], closing["balance_after"]) == ("129", "129")


def test_a_period_opens_where_the_one_before_it_closed() -> None:
    book = a_book()
    first = of(book, until=NOW + MONTH)
    second = of(book, since=NOW + MONTH)
    assert [len(rows(one)) for one in (first, second)] == [5, 4]
    assert rows(first)[-1]["hash"] == rows(second)[0]["hash"]
    assert rows(first)[-1]["balance_after"] == rows(second)[0]["balance_after"] == "56"
    checked = check(second, earlier=ends_with(first))
    assert (checked.faults, checked.earlier) == ([], True)


def test_the_same_entries_make_the_same_bytes_in_rfc_4180() -> None:
    book = a_book()
    assert of(book) == of(book)
    assert all(line.endswith("\r\n") for line in of(book).splitlines(keepends=True))


def test_a_statement_without_movements_still_foots() -> None:
    book = a_book()
    empty = of(book, since=NOW + timedelta(days=5), until=NOW + timedelta(days=6))
    checked = check(empty)
    assert (checked.faults, checked.entries, checked.closing_balance) == ([], 0, "56")
    assert check(compose("t-1", "USD", [])).faults == []


@pytest.mark.parametrize("reason", ["=HYPERLINK(1)", "+1", "-1", "@x", 'a "quote", and\r\na line'])
def test_what_a_spreadsheet_would_run_is_neutralised_and_the_record_is_kept(reason: str) -> None:
    book = Book(an_account("10"))
    command = Adjustment(
        tenant_id="t-1", issued_at=NOW, amount=Money(amount="-1", currency="USD"), reason=reason
    )
    book.feed(a_command(command))
    text = compose("t-1", "USD", book.entries)
    described = rows(text)[1]["description"]
    assert not described.startswith(("=", "+", "-", "@"))
    assert reason in described
    assert rows(text)[1]["record"].encode() == book.entries[0]
    assert rows(text)[1]["amount"] == "-1"


def rechained(text: str, old: str, new: str) -> str:
    """A statement in which something was changed and every hash after it made to fit, as a forger
    would."""
    table = rows(text)
    head = table[0]["hash"]
    for row in table[1:-1]:
        body, _, _ = row["record"].replace(old, new).rpartition(',"hash":"')
        head = sha256(bytes.fromhex(head) + body.encode()).hexdigest()
        row["record"] = f'{body},"hash":"{head}"}}'
        row["hash"] = head
        row["description"] = row["description"].replace(old, new)
    table[-1]["hash"] = head
    out = io.StringIO()
    writer = csv.DictWriter(out, statement.COLUMNS)
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def test_a_forged_chain_foots_but_does_not_have_the_earlier_head() -> None:
    book = a_book()
    kept = ends_with(of(book, until=NOW + MONTH))
    forged = rechained(of(book), "wire-1", "wire-9")
    checked = check(forged, earlier=kept)
    assert (checked.faults, checked.earlier) == ([], False)
    assert check(forged, earlier=kept[1]).earlier is False
    assert check(of(book), earlier=kept[1]).earlier is True


def test_an_earlier_head_the_statement_does_not_reach_is_neither_right_nor_wrong() -> None:
    book = a_book()
    first, second = of(book, until=NOW + timedelta(hours=1)), of(book, since=NOW + MONTH)
    assert check(second, earlier=ends_with(first)).earlier is None
    assert check(first, earlier=ends_with(second)).earlier is None


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('""amount"":""-4""', '""amount"":""-3""', "the hash does not follow"),
        (",charge,", ",adjustment,", "a column does not say what its record says"),
        (",-4,6,USD,", ",-3,6,USD,", "a column does not say what its record says"),
        ("closing,t-1,5,", "closing,t-1,6,", "does not name the last entry"),
        (",129,129,USD,", ",129,130,USD,", "the balance is not that after the last entry"),
        (",129,129,USD,", ",128,129,USD,", "the sum of the amounts is another"),
        ("opening,t-1,0,", "opening,t-1,3,", "is missing"),
    ],
)
def test_whatever_was_changed_is_named(old: str, new: str, fault: str) -> None:
    text = of(a_book())
    assert old in text
    assert any(fault in one for one in check(text.replace(old, new, 1)).faults)


def test_an_entry_that_was_taken_out_is_missed() -> None:
    lines = of(a_book()).splitlines(keepends=True)
    faults = check("".join([*lines[:3], *lines[4:]])).faults
    assert "entry 3: number 2 is missing" in faults
    assert "entry 3: the hash does not follow from the entry before it" in faults


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\r\n",
        ",".join(statement.COLUMNS) + "\r\n",
        ",".join(statement.COLUMNS) + "\r\nopening\r\nclosing\r\n",
        '"',
    ],
)
def test_what_is_no_statement_is_said_to_be_none(text: str) -> None:
    with pytest.raises(StatementError):
        check(text)


@cache
def the_statement() -> str:
    """One and the same for every example; events count on in their names."""
    return of(a_book())


@settings(max_examples=400)
@given(st.data())
def test_a_changed_byte_is_a_fault_or_no_statement(data: st.DataObject) -> None:
    text = the_statement()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = data.draw(st.sampled_from("0129ax,\"'{}"))
    forged = text[:at] + changed + text[at + 1 :]
    # Dates of the period's bounds are for people; nothing is proven by them.
    same = [
        {name: cell for name, cell in row.items() if row["row"] == "entry" or name != "booked_at"}
        for row in rows(text)
    ]
    try:
        checked = check(forged)
    except StatementError:
        return
    after = [
        {name: cell for name, cell in row.items() if row["row"] == "entry" or name != "booked_at"}
        for row in rows(forged)
    ]
    assert checked.faults or after == same


def test_a_tenants_first_entry_has_no_hash_before_it() -> None:
    outcome = apply(None, a_command(opening(opening_balance="10")))
    text = compose("t-1", "USD", outcome.entries)
    assert rows(text)[0]["hash"] == "0" * 64
    assert check(text.replace("0" * 64, "1" * 64, 1)).faults
