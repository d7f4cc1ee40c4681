"""The auditor's reckoning of included minutes: it finds what is wrong and agrees with the rest."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas import topics
from schemas.commands import Licences
from schemas.ledger import EntryKind, LedgerEntry
from schemas.usage import Kind
from streams.billing.account import encode_row
from streams.billing.rates import Rate, Tariff
from streams.coverage import load_coverage
from streams.testbed.auditor.minutes import (
    Booked,
    Call,
    Coverage,
    Licence,
    Line,
    Reckoning,
    lines_of,
)
from streams.testbed.auditor.prices import Deck, billed_parts
from streams.testbed.auditor.verdict import UNKNOWN
from tests.auditor.books import AT, Books, record, usage, violated
from tests.billing.builders import NOW, Book, a_call, a_command, corrected, opening

LICENSED: dict[str, Any] = {
    "command": "licences", "command_id": "lic", "source": "cli", "capability": "MCOMEETADV",
    "count": 1, "effective_from": "2026-03-01T00:00:00Z",
}  # fmt: skip


class Included(Books):
    """As `Books`, but the call is a conference's, three minutes long: two included, one paid."""

    def __init__(self) -> None:
        super().__init__()
        self.records[topics.COMMAND].append(record(topics.COMMAND, 1, LICENSED))
        self.records[topics.NOTIFICATION].append(
            record(
                topics.NOTIFICATION, 1,
                {"notice": "command_applied", "command_id": "lic", "at": "2026-03-02T09:00:00Z"},
            )
        )  # fmt: skip
        self.next[topics.COMMAND] = 2
        self.entries[1]["rate"]["duration_s"] = 180
        self.line: dict[str, Any] = {
            "pool": "conference/MCOMEETADV", "month": "2026-03", "minutes": 2, "used": 60,
            "included": 60,
        }  # fmt: skip
        self.entries[1]["pools"] = [self.line]
        # Before it a call of 58 minutes, which the pool paid.
        first = self.charge(2, 4, "e0", "0", "100") | {"kind": "pool"}
        first["rate"]["duration_s"] = 58 * 60
        first["pools"] = [self.line | {"minutes": 58, "used": 58}]
        self.entries.insert(1, first)
        for seq, entry in enumerate(self.entries, 1):
            entry["seq"] = seq
        self.call = {"kind": "conf_dial_out", "duration_s": 180}
        self.calls(self.call)

    def calls(self, changes: dict[str, Any]) -> None:
        for offset in (0, 1):
            self.records[topics.CALL_USAGE][offset] = record(
                topics.CALL_USAGE, offset, usage("e1", **changes)
            )
        long = usage("e0", kind="conf_dial_out", duration_s=58 * 60)
        self.records[topics.CALL_USAGE][4:] = [record(topics.CALL_USAGE, 4, long)]
        self.next[topics.CALL_USAGE] = 5


def test_minutes_that_were_due_hold() -> None:
    report = Included().audited()
    assert violated(report) == set(), report.lines()
    assert report.counts["included minutes"] == 60


def a_correction(books: Included, **changes: Any) -> None:
    """The call that the pool paid alone was one of a minute; its minute is included, too."""
    fix = usage("fix", kind="conf_dial_out", phase="correction", corrects="e0", duration_s=60)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 5, fix))
    books.next[topics.CALL_USAGE] = 6
    cause = (topics.CALL_USAGE, 5, "pbx", "fix")
    links = {"corrects": "e0", "entry": 2}
    line = {name: value for name, value in books.line.items() if name != "included"}
    back = books.entry(5, "reversal", "0", "149.4", cause, links=links)
    back["pools"] = [line | {"minutes": -58, "used": 2}]
    again = books.charge(6, 5, "fix", "0", "149.4") | {"kind": "pool", "links": links}
    again["pools"] = [books.line | {"minutes": 1, "used": 3}]
    books.entries += [back | changes, again]


def test_a_call_that_included_minutes_paid_is_corrected() -> None:
    books = Included()
    a_correction(books)
    report = books.audited()
    assert violated(report) == set(), report.lines()
    assert report.counts["reversals"] == 1


@pytest.mark.parametrize("given_back", [0, 57, 59])
def test_a_correction_gives_back_the_minutes_that_were_taken(given_back: int) -> None:
    books = Included()
    line = {"pool": books.line["pool"], "month": "2026-03"}
    left = 60 - given_back
    a_correction(books, pools=[line | {"minutes": -given_back, "used": left}] if given_back else [])
    books.entries[-1]["pools"] = [books.line | {"minutes": 1, "used": left + 1}]
    if not given_back:
        # Nothing is left of the pool: credits pay the minute.
        books.entries[-1] |= {
            "kind": "charge", "pools": [], "amount": "-0.6", "balance_after": "148.8"
        }  # fmt: skip
    assert violated(books.audited()) == {"pools"}


def test_what_included_minutes_pay_instead_is_linked_as_well() -> None:
    books = Included()
    a_correction(books)
    del books.entries[-1]["links"]
    assert violated(books.audited()) == {"correction"}


def more_than_included(books: Included) -> None:
    books.entries[2]["pools"] = [books.line | {"minutes": 3, "used": 61}]


def minutes_not_taken(books: Included) -> None:
    books.entries[2] |= {"pools": [], "amount": "-1.8", "balance_after": "98.2"}
    books.entries[3]["balance_after"] = "148.2"


def of_another_month(books: Included) -> None:
    books.entries[2]["pools"] = [books.line | {"month": "2026-02", "used": 2}]


def of_another_pool(books: Included) -> None:
    books.entries[2]["pools"] = [books.line | {"pool": "domestic/MCOPSTN1/GB", "used": 2}]


def another_sum(books: Included) -> None:
    books.entries[2]["pools"] = [books.line | {"used": 59}]


def without_licences(books: Included) -> None:
    changed = LICENSED | {"count": 0}
    books.records[topics.COMMAND][1] = record(topics.COMMAND, 1, changed)


def not_conference_minutes(books: Included) -> None:
    books.calls(books.call | {"kind": "payg_out"})


def licences_of_later(books: Included) -> None:
    changed = LICENSED | {"effective_from": "2026-03-02T10:00:01Z"}
    books.records[topics.COMMAND][1] = record(topics.COMMAND, 1, changed)


def kind_of_another_amount(books: Included) -> None:
    books.entries[1]["kind"] = "charge"


@pytest.mark.parametrize(
    "breach",
    [
        minutes_not_taken, of_another_month, of_another_pool, another_sum, without_licences,
        not_conference_minutes, licences_of_later, kind_of_another_amount,
    ],
)  # fmt: skip
def test_wrong_minutes_turn_pools_red_and_nothing_else(breach: Any) -> None:
    books = Included()
    breach(books)
    report = books.audited()
    assert violated(report) == {"pools"}, report.lines()


def test_more_than_is_included_is_found() -> None:
    books = Included()
    more_than_included(books)
    assert {"pools", "price"} <= violated(books.audited())


def test_a_straddling_charge_is_priced_without_its_included_minutes() -> None:
    books = Included()
    books.entries[2] |= {"amount": "-1.8", "balance_after": "98.2"}
    books.entries[3]["balance_after"] = "148.2"
    assert violated(books.audited()) == {"price"}


def test_licences_that_are_no_longer_there_are_unknown() -> None:
    books = Included()
    books.records[topics.COMMAND] = []
    books.records[topics.NOTIFICATION] = books.records[topics.NOTIFICATION][1:2]
    books.starts = {topics.COMMAND: 2}
    report = books.audited()
    assert report.findings["pools"].unknown
    assert "pools" not in violated(report)
    assert report.exit_code == UNKNOWN


# -- corrections ----------------------------------------------------------------------------------


class Corrected(Included):
    """And both calls were wrong: the straddling one lasted a minute, then the other was free."""

    def __init__(self) -> None:
        super().__init__()
        self.next[topics.CALL_USAGE] = 7
        short = usage(
            "fix1", phase="correction", corrects="e1", kind="conf_dial_out", duration_s=60
        )
        free = usage("fix0", phase="correction", corrects="e0", kind="free", duration_s=60)
        self.records[topics.CALL_USAGE] += [
            record(topics.CALL_USAGE, 5, short), record(topics.CALL_USAGE, 6, free),
        ]  # fmt: skip
        place = (topics.CALL_USAGE, 5, "pbx", "fix1")
        links = {"corrects": "e1", "entry": 3}
        pool = self.charge(6, 5, "fix1", "0", "150") | {"kind": "pool", "links": links}
        self.entries += [
            self.entry(
                5, "reversal", "0.6", "150", place, links=links, pools=[self.given(-2, 58)],
            ),
            pool | {"pools": [self.line | {"minutes": 1, "used": 59}]},
            self.entry(
                7, "reversal", "0", "150", (topics.CALL_USAGE, 6, "pbx", "fix0"),
                links={"corrects": "e0", "entry": 2}, pools=[self.given(-58, 1)],
            ),
        ]  # fmt: skip

    def given(self, minutes: int, used: int) -> dict[str, Any]:
        line = self.line | {"minutes": minutes, "used": used}
        del line["included"]
        return line


def test_minutes_that_returned_hold() -> None:
    report = Corrected().audited()
    assert violated(report) == set(), report.lines()
    assert (report.counts["included minutes"], report.counts["reversals"]) == (1, 2)


def kept_minutes(books: Corrected) -> None:
    books.entries[6]["pools"] = []


def given_back_twice(books: Corrected) -> None:
    books.entries[4]["pools"] = [books.given(-4, 56)]
    books.entries[5]["pools"] = [books.line | {"minutes": 1, "used": 57}]
    books.entries[6]["pools"] = [books.given(-58, -1)]


def given_to_another_month(books: Corrected) -> None:
    books.entries[6]["pools"] = [books.given(-58, -58) | {"month": "2026-02"}]


def given_to_a_month_that_is_over(books: Corrected) -> None:
    # The end of March, and 35 days: 5 May.
    books.entries[6]["booked_at"] = "2026-05-06T00:00:01Z"


def reversed_the_pool_twice(books: Corrected) -> None:
    free = usage("again", phase="correction", corrects="e0", kind="free", duration_s=60)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 7, free))
    books.next[topics.CALL_USAGE] = 8
    again = books.entry(
        8, "reversal", "0", "150", (topics.CALL_USAGE, 7, "pbx", "again"),
        links={"corrects": "e0", "entry": 2},
    )  # fmt: skip
    books.entries.append(again)


def pool_without_links(books: Corrected) -> None:
    del books.entries[5]["links"]


def pool_not_reversed(books: Corrected) -> None:
    del books.entries[6]


@pytest.mark.parametrize(
    ("breach", "reds"),
    [
        (kept_minutes, {"pools"}),
        (given_back_twice, {"pools"}),
        (given_to_another_month, {"pools"}),
        (given_to_a_month_that_is_over, {"pools"}),
        (reversed_the_pool_twice, {"correction", "pools"}),
        (pool_without_links, {"correction"}),
        (pool_not_reversed, {"at_least_once"}),
    ],
)
def test_wrong_corrections_of_included_calls_are_found(breach: Any, reds: set[str]) -> None:
    books = Corrected()
    breach(books)
    report = books.audited()
    assert violated(report) == reds, report.lines()


@pytest.mark.parametrize(
    ("breach", "reds"),
    [(None, set()), (kept_minutes, {"pools"}), (reversed_the_pool_twice, {"correction", "pools"})],
)
def test_a_checkpoint_knows_which_minutes_may_return(breach: Any, reds: set[str]) -> None:
    books = Corrected()
    if breach is not None:
        breach(books)
    begun = {topics.LEDGER: 4, topics.CALL_USAGE: 5}
    report, _ = books.audited_from(begun, Included().checkpoint())
    assert violated(report) == reds, report.lines()
    if breach is reversed_the_pool_twice:
        begun = {topics.LEDGER: 7, topics.CALL_USAGE: 7}
        report, _ = books.audited_from(begun, Corrected().checkpoint())
        assert violated(report) == reds, report.lines()


def test_an_entry_of_the_commands_instant_may_know_it_or_not() -> None:
    at = datetime.fromisoformat(AT)
    call = Call("conf_dial_out", None, None, at, 60, {"Country": "GB"})
    licence = Licence("MCOMEETADV", "", 1, at, at)
    line = {"pool": "conference/MCOMEETADV", "month": "2026-03", "minutes": 1, "used": 1}

    def faults(booked_at: datetime, lines: list[dict[str, Any]]) -> list[str]:
        kind, amount = ("pool", 0) if lines else ("charge", -1)
        booked = Booked(2, kind, amount, booked_at, lines, call)
        return list(Reckoning(Coverage(), "UTC", [licence]).judge([booked], complete=True))

    assert faults(at, [line]) == faults(at, []) == []
    later = at + timedelta(seconds=1)
    assert faults(later, [line]) == []
    assert faults(later, []) == ["2 took no minutes, where 1 min of conference/MCOMEETADV in "
                                 "2026-03 was due"]  # fmt: skip


def test_the_rest_of_a_call_is_billed_in_its_place() -> None:
    row = {"Price / min": "0.6", "Steps": "0:0.6/60;120:0.3/1"}
    assert billed_parts(row, 200, 60) == [(60, 120), (120, 200)]
    assert billed_parts({"Initial increment": "30", "Increment": "6"}, 219, 120) == [(120, 222)]
    text = (
        "Destination Name,Destination Type,Country,Prefix,Price / min,Connect fee,Steps\n"
        'A,m,GB,44,0.6,0.05,"0:0.6/60;120:0.3/1"\nB,m,GB,45,0.6,0.05,\n'
    )
    deck = Deck(text.encode())
    at = datetime.fromisoformat(AT)
    assert deck.price("44", at, 200, 60) == 1_050_000_000
    assert deck.price("44", at, 200, 240) == deck.price("45", at, 200, 240) == 0
    assert deck.price("45", at, 200, 120) == 1_250_000_000


# -- agreement ------------------------------------------------------------------------------------

KINDS = (Kind.CONF_DIAL_OUT, Kind.INTERNATIONAL, Kind.OVERAGE_DOMESTIC, Kind.PAYG_OUT)
PLANS = (("MCOMEETADV", None), ("MCOPSTN2", "GB"), ("MCOPSTN2", "FR"), ("MCOPSTN6", "GB"))
STORIES = st.lists(
    st.one_of(
        st.tuples(
            st.just("licences"), st.sampled_from(PLANS), st.integers(0, 2), st.integers(-9, 9)
        ),
        st.tuples(
            st.sampled_from(KINDS),
            st.sampled_from(["MCOPSTN2", "MCOPSTN6", None]),
            st.sampled_from(["GB", "FR", None]),
            st.integers(1, 30_000),
            st.integers(0, 34),
        ),
        st.tuples(st.just("wait"), st.integers(0, 30)),
        st.tuples(
            st.just("correct"),
            st.integers(0, 9),
            st.sampled_from([*KINDS, Kind.FREE]),
            st.integers(1, 30_000),
            st.integers(0, 34),
        ),
    ),
    max_size=25,
)  # fmt: skip
RATES = {
    "4420": Rate(prefix="4420", per_minute=10**9, country="GB", type="landline"),
    "33": Rate(prefix="33", per_minute=10**9, country="ME", type="mobile"),
}
ROW = {"Country": "GB", "Destination Type": "landline"}


@given(STORIES, st.sampled_from(["UTC", "America/New_York", "Pacific/Auckland"]))
@search(max_examples=150)
def test_it_agrees_with_what_is_booked(story: list[Any], zone: str) -> None:
    book, now = Book(), NOW
    terms: dict[str, Any] = {
        "coverage": load_coverage(None), "tariff": Tariff("default", "t", RATES),
    }  # fmt: skip
    since = NOW - timedelta(days=60)
    book.feed(a_command(opening(time_zone=zone, billing_from=since)), now, **terms)
    licences: list[Licence] = []
    booked: list[Booked] = []
    names: list[str] = []
    taken: dict[int | None, list[Line]] = {}
    for step in story:
        now += timedelta(seconds=1)
        match step:
            case ("wait", days):
                now += timedelta(days=days)
            case ("licences", (plan, country), count, days):
                at = now + timedelta(days=days)
                command = Licences(
                    tenant_id="t-1", issued_at=NOW, capability=plan, count=count,
                    country=country, effective_from=at,
                )  # fmt: skip
                outcome = book.feed(a_command(command), now, **terms)
                if outcome.label == "applied":
                    licences.append(Licence(plan, country or "", count, at, now))
            case (kind, capability, country, seconds, days):
                started = now - timedelta(days=days, seconds=seconds)
                of: str | None = None
                if kind == "correct":
                    if capability >= len(names):
                        continue
                    of, kind, capability, country = names.pop(capability), country, None, None
                event = a_call(
                    kind=kind, capability=capability, user_country=country,
                    duration_s=seconds, started_at=started,
                )  # fmt: skip
                if of is not None:
                    event = corrected(event, of, book.entries, event.cause.id)
                names.append(event.cause.id)
                for value in book.feed(event, now, **terms).entries:
                    entry = msgspec.json.decode(value, type=LedgerEntry)
                    lines = list(msgspec.to_builtins(entry.pools))
                    call = Call(kind, capability, country, started, seconds, ROW)
                    amount = 0 if entry.amount == "0" else -1
                    undone = None
                    if entry.kind is EntryKind.REVERSAL:
                        assert entry.links is not None
                        undone = taken[entry.links.entry]
                    taken[entry.seq] = lines_of(lines)
                    booked.append(Booked(entry.seq, entry.kind, amount, now, lines, call, undone))
    assert list(Reckoning(Coverage(), zone, licences).judge(booked, complete=True)) == []
    assert book.account is not None
    assert len(encode_row(book.account)) < 4_096


def test_it_reads_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "coverage.toml"
    path.write_text('[sources]\nfree = ["free"]\npayg_out = ["credits"]\n')
    assert Coverage(path).free == {"free"}
    assert Coverage().free == load_coverage(None).free
    assert Coverage().minutes("MCOPSTN1", "domestic", "GB") == 1_200
    assert Coverage().minutes("MCOPSTN1", "domestic", "BR") == 0
