"""Audits that go on from one another, and what topics have let go before any of them."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest
from msgspec.structs import replace

from schemas import topics
from streams.testbed.auditor import settled
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.letters import Moves
from streams.testbed.auditor.records import Log, Record, home
from streams.testbed.auditor.verdict import HOLDS, UNKNOWN, VIOLATED, Report
from streams.testbed.auditor.view import POSITION, Options, View
from tests.auditor.books import (
    AT,
    KEPT,
    NAMES,
    NAMESPACE,
    RECHARGE,
    TENANT,
    UNSET,
    Books,
    of_before,
    record,
    usage,
    violated,
)

BEGUN: Mapping[str, int] = {
    topics.COMMAND: 1,
    topics.NOTIFICATION: 2,
    topics.CALL_USAGE: 4,
    topics.RESULT: 1,
    topics.LEDGER: 3,
    topics.BALANCE: 0,
    topics.REQUESTED: 1,
}
LATER = "2026-04-20T10:00:00Z"
FIVE = {"amount": "5", "currency": "USD"}


def unknown(report: Report) -> set[str]:
    return {name for name, found in report.findings.items() if found.unknown}


def asked_again(books: Books) -> None:
    """Weeks later the next request goes out."""
    name = str(uuid.uuid5(NAMESPACE, f"{TENANT}/2/1"))
    books.position_changes = {"now": LATER}
    call = record(topics.CALL_USAGE, 4, usage("e9", started_at=LATER))
    books.records[topics.CALL_USAGE].append(call)
    books.next[topics.CALL_USAGE] = 5
    charge = books.charge(4, 4, "e9", "-0.6", "148.8") | {"at": LATER, "booked_at": LATER}
    books.entries.append(charge)
    request = books.request(2, 1, name, caused_by="pbx/e9", requested_at=LATER)
    books.records[topics.REQUESTED].append(record(topics.REQUESTED, 1, request))
    books.tell("recharge_requested", recharge_id=name, at=LATER)


def test_what_is_beyond_the_position_is_left_to_the_next_audit() -> None:
    books = Books()
    log = books.log()
    books.entries.append(books.charge(4, 4, "e9", "-0.6", "148.8"))
    later = books.log()
    ledger = later.records[topics.LEDGER]
    call = record(topics.CALL_USAGE, 4, usage("e9"))
    log.records |= {
        topics.LEDGER: ledger,
        topics.CALL_USAGE: [*books.records[topics.CALL_USAGE], call],
    }
    report, reached = audit([log], names=NAMES, partitions=1, deck=books.deck)
    assert report.exit_code == HOLDS, report.lines()
    assert (report.counts["events"], report.counts["pending"]) == (4, 1)
    assert reached["0"]["ends"] == {topics.LEDGER: 3, topics.CALL_USAGE: 4}


def a_view(
    partition: int, booked: int, earlier: Any = None, records: Sequence[Record] = ()
) -> View:
    position = {"now": AT, "sources": {topics.CALL_USAGE: {"next": booked}}}
    rows = {POSITION: json.dumps(position).encode()}
    log = Log(partition=partition, rows=rows, records={topics.CALL_USAGE: records})
    return View(Report(), log, names=NAMES, partitions=2, options=Options(), earlier=earlier)


@pytest.mark.parametrize(("booked", "red"), [(3, set()), (4, {"partition"})])
def test_what_arrived_before_its_origin_was_booked_is_expected_later(
    booked: int, red: set[str]
) -> None:
    """The partition to which a record was moved has booked it, and the other's row is older."""
    strayed = record(topics.CALL_USAGE, 3, usage("e9"))
    origin = (("credits-moved-from", f"{topics.CALL_USAGE}/0/3".encode()),)
    moves = Moves()
    moves.begin(a_view(0, booked, records=[strayed]))
    moves.begin(a_view(1, 8))
    moves.look(topics.CALL_USAGE, replace(strayed, partition=1, offset=7, headers=origin))
    # Of others anybody may say it.
    nowhere = (("credits-moved-from", f"{topics.CALL_USAGE}/0/4".encode()),)
    moves.look(topics.CALL_USAGE, replace(strayed, partition=1, offset=6, headers=nowhere))
    handed_on = json.loads(json.dumps(moves.checkpoint(1)))

    moves = Moves()
    moves.begin(a_view(0, 4))
    moves.begin(a_view(1, 8, handed_on))
    moves.expect(topics.CALL_USAGE, strayed)
    report = Report()
    moves.judge(report)
    assert violated(report) == red
    assert moves.checkpoint(1) == {"arrived": []}


@pytest.mark.parametrize("said", [b"", b"nowhere", b"a/b/c", b"\xff/1/2", b"x/-1/2", b"x/1/2"])
def test_whatever_a_producer_says_of_a_move_is_no_reason_to_stop(said: bytes) -> None:
    books = Books()
    calls = books.records[topics.CALL_USAGE]
    calls[3] = replace(calls[3], headers=(("credits-moved-from", said),))
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_a_letter_of_a_moved_record_that_is_replayed_is_no_second_arrival() -> None:
    strayed = record(topics.CALL_USAGE, 3, usage("e9"))
    origin = ("credits-moved-from", f"{topics.CALL_USAGE}/0/3".encode())
    moves = Moves()
    moves.begin(a_view(0, 4))
    moves.begin(a_view(1, 9))
    moves.expect(topics.CALL_USAGE, strayed)
    again = (origin, ("credits-dlq-attempt", b"2"))
    for offset, headers in enumerate([(origin,), again], 7):
        arrived = replace(strayed, partition=1, offset=offset, headers=headers)
        moves.look(topics.CALL_USAGE, arrived)
    report = Report()
    moves.judge(report)
    assert violated(report) == set(), report.lines()


def ends_of(books: Books) -> dict[str, int]:
    return {topic: len(list(records)) for topic, records in books.log().records.items()}


def gone_on(first: Books, later: Books) -> Report:
    """What an audit says that goes on from where one of the first books has ended."""
    begun = dict.fromkeys(later.log().records, 0) | ends_of(first)
    report, _ = later.audited_from(begun, first.checkpoint())
    return report


def dated() -> Books:
    """The books, and the first command's answer says when it was given."""
    books = Books()
    books.records[topics.NOTIFICATION].clear()
    books.tell("command_applied", command_id="open")
    books.tell("recharge_requested", recharge_id=RECHARGE)
    return books


def test_a_command_is_a_repeat_for_as_long_as_its_id_may_be_remembered() -> None:
    """Which is until the end of a week and 35 days more."""
    books = dated()
    begun = ends_of(books)
    earlier = books.checkpoint()
    later = dated()
    later.position_changes = {"now": "2026-04-07T10:00:00Z"}
    _, earlier = later.audited_from(begun, earlier)
    at = "2026-04-08T10:00:00Z"
    later.position_changes = {"now": at}
    again = replace(later.records[topics.COMMAND][0], offset=1)
    later.records[topics.COMMAND].append(again)
    later.next[topics.COMMAND] = 2
    later.tell("command_repeated", command_id="open", at=at)
    report, _ = later.audited_from(begun, earlier)
    assert report.exit_code == HOLDS, report.lines()


def test_a_result_that_contradicts_one_of_an_earlier_audit_is_rightly_refused() -> None:
    later = Books()
    other = later.result("r1", amount={"amount": "51", "currency": "USD"})
    later.records[topics.RESULT].append(record(topics.RESULT, 1, other))
    later.next[topics.RESULT] = 2
    raw = later.records[topics.RESULT][1].value or b""
    letter = replace(later.letter(1, raw, "conflict"), topic="letters")
    later.records[topics.dead_letters_of(topics.RESULT)] = [letter]
    report = gone_on(Books(), later)
    assert report.exit_code == HOLDS, report.lines()


def test_an_entry_of_what_an_earlier_audit_has_judged_comes_too_late() -> None:
    later = Books()
    later.entries.append(later.charge(4, 0, "e1", "-0.6", "148.8"))
    assert "cause" in violated(gone_on(Books(), later))


@pytest.mark.parametrize(
    ("day", "red"), [("2026-04-05", {"at_most_once"}), ("2026-04-07", set()), ("2026-05-20", set())]
)
def test_an_id_is_charged_once_for_as_long_as_it_is_remembered(day: str, red: set[str]) -> None:
    books, at = Books(), f"{day}T10:00:00Z"
    earlier = books.checkpoint()
    again = usage("e1", started_at=at)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, again))
    books.next[topics.CALL_USAGE] = 5
    charge = books.charge(4, 4, "e1", "-0.6", "148.8")
    books.entries.append(charge | {"at": at, "booked_at": at})
    report, later = books.audited_from(BEGUN, earlier)
    assert violated(report) == red, report.lines()
    # Of what is surely forgotten nothing is handed on.
    kept = {AT[:10], day} if day < "2026-05" else {day}
    assert later["0"]["ids"].keys() == kept


FUTURE = "2099-01-01T00:00:00Z"


def forged(topic: str, books: Books, log: Log) -> Record:
    """An output of what nobody has sent, or of a time that has not come."""
    if topic == topics.LEDGER:
        books.entries.append(books.charge(9, 999, "e9", "-77", "72.4"))
        return list(books.log().records[topic])[-1]
    if topic == topics.NOTIFICATION:
        answer = {"notice": "command_applied", "command_id": "open", "tenant_id": TENANT}
        named = (("ce_id", f"{TENANT}/{topics.COMMAND}/0/500/1".encode()),)
        return replace(record(topic, 2, answer), headers=named)
    if topic == topics.REQUESTED:
        return record(topic, 1, books.request(7, 1, "not-derived", requested_at=FUTURE))
    if topic == topics.BALANCE:
        public = json.loads(next(iter(log.records[topic])).value or b"")
        return record(topic, 1, public | {"balance": "9999", "hash": "00", "as_of": FUTURE})
    return replace(books.letter(700, b"{x"), offset=1)


@pytest.mark.parametrize(
    ("topic", "code"),
    [
        (topics.LEDGER, VIOLATED),
        (topics.NOTIFICATION, VIOLATED),
        (topics.dead_letters_of(topics.CALL_USAGE), VIOLATED),
        (topics.BALANCE, UNKNOWN),
        (topics.REQUESTED, UNKNOWN),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_no_audit_would_ever_judge_is_found(topic: str, code: int, hidden: bool) -> None:
    books = Books()
    log = books.log()
    log.records = {**log.records, topic: [*log.records[topic], forged(topic, books, log)]}
    log.read_at = datetime.fromisoformat(AT)
    if hidden:
        # It may come of what stands behind an open transaction.
        log.hidden = frozenset(topics.SOURCES)
    report, _ = audit([log], names=NAMES, partitions=1, deck=books.deck)
    assert report.exit_code == (HOLDS if hidden and code == VIOLATED else code), report.lines()


def test_a_notice_that_comes_of_no_topic_that_there_is_is_judged() -> None:
    books = Books()
    told = record(topics.NOTIFICATION, 2, {"notice": "x", "tenant_id": TENANT, "at": AT})
    named = (("ce_id", f"{TENANT}/nowhere/0/500/1".encode()),)
    books.records[topics.NOTIFICATION].append(replace(told, headers=named))
    assert books.audited().counts.get("later outputs", 0) == 0


def test_what_may_stand_behind_an_open_transaction_is_not_lost() -> None:
    home_of_it = home(TENANT.encode(), 2)
    strayed = replace(record(topics.CALL_USAGE, 3, usage("e9")), partition=1 - home_of_it)
    for hidden, red in ((topics.CALL_USAGE, set()), (topics.RESULT, {"partition"})):
        moves = Moves()
        view = a_view(home_of_it, 4)
        view.log.hidden = frozenset({hidden})
        moves.begin(view)
        moves.expect(topics.CALL_USAGE, strayed)
        report = Report()
        moves.judge(report)
        assert (violated(report), unknown(report)) == (red, {"partition"} - red)


def test_a_payment_that_an_earlier_audit_knows_may_be_booked_by_hand_after_it() -> None:
    books = Books()
    books.entries = books.entries[:2]
    waits = books.result("r1", status="needs_action")
    del waits["amount"]
    books.records[topics.RESULT] = [record(topics.RESULT, 0, waits)]
    earlier = books.checkpoint()
    books.command(
        "resolve_recharge", command_id="res", recharge_id=RECHARGE, paid=True,
        payment_id="p1", amount={"amount": "50", "currency": "USD"},
    )  # fmt: skip
    cause = (topics.COMMAND, 1, "cli", "res")
    books.entries.append(
        books.entry(3, "recharge", "50", "149.4", cause, recharge_id=RECHARGE, payment_id="p1")
    )
    assert violated(books.audited()) == set()
    report, _ = books.audited_from({**BEGUN, topics.LEDGER: 2}, earlier)
    assert violated(report) == set(), report.lines()


def test_a_refund_that_an_earlier_audit_knows_may_precede_its_payment() -> None:
    books = Books()
    back = books.result("r2", status="refunded", payment_id="p7", recharge_id="zz", amount=FIVE)
    books.records[topics.RESULT].append(record(topics.RESULT, 1, back))
    books.next[topics.RESULT] = 2
    books.entries.append(
        books.entry(
            4, "refund", "-5", "144.4", (topics.RESULT, 1, "pay", "r2"),
            recharge_id="zz", payment_id="p7",
        )
    )  # fmt: skip
    earlier = books.checkpoint()
    books.command("book_payment", command_id="bp", payment_id="p7", amount=FIVE)
    cause = (topics.COMMAND, 1, "cli", "bp")
    books.entries.append(books.entry(5, "purchase", "5", "149.4", cause, payment_id="p7"))
    report, _ = books.audited_from({**BEGUN, topics.LEDGER: 4, topics.RESULT: 2}, earlier)
    assert violated(report) == set(), report.lines()


def test_an_answer_that_was_gone_before_the_first_audit_is_unknown_in_the_next() -> None:
    books = Books()
    books.starts = {topics.RESULT: 1}
    books.records[topics.RESULT] = []
    earlier = books.checkpoint()
    asked_again(books)
    report, _ = books.audited_from(BEGUN, earlier)
    assert (violated(report), unknown(report)) == (set(), {"one_request"}), report.lines()


@pytest.mark.parametrize("amount", [{"amount": "50", "currency": "USD"}, None])
def test_a_late_success_of_what_was_asked_for_before_the_first_audit_is_unknown(
    amount: Any,
) -> None:
    books = Books()
    books.entries = books.entries[:2]
    books.records[topics.RESULT] = []
    books.records[topics.REQUESTED] = []
    books.next[topics.RESULT] = 0
    books.starts = {topics.REQUESTED: 1}
    earlier = books.checkpoint()
    books.position_changes = {"now": LATER}
    paid = books.result("r1", occurred_at=LATER, amount=amount)
    books.records[topics.RESULT] = [record(topics.RESULT, 0, paid)]
    books.next[topics.RESULT] = 1
    cause = (topics.RESULT, 0, "pay", "r1")
    entry = books.entry(3, "recharge", "50", "149.4", cause, recharge_id=RECHARGE, payment_id="p1")
    books.entries.append(entry | {"at": LATER, "booked_at": LATER})
    begun = {**BEGUN, topics.LEDGER: 2, topics.RESULT: 0}
    report, _ = books.audited_from(begun, earlier)
    assert violated(report) == set(), report.lines()
    assert "recharge" in unknown(report)


def test_a_lot_that_was_asked_for_before_the_first_audit_is_unknown_when_it_comes() -> None:
    books = Books()
    books.starts = {topics.COMMAND: 1}
    books.records[topics.COMMAND] = []
    earlier = books.checkpoint()
    books.position_changes = {"now": LATER}
    lot = [{"id": "cabc", "amount": "10", "left": "10"}]
    entry = books.entry(4, "grant", "10", "159.4", ("tick", -1, "tick", LATER), grants=lot)
    entry["caused_by"]["partition"] = -1
    books.entries.append(entry | {"at": LATER, "booked_at": LATER})
    report, _ = books.audited_from(BEGUN, earlier)
    assert "cause" in unknown(report) - violated(report), report.lines()


def test_a_checkpoint_that_says_less_is_gone_on_from_twice_without_an_alarm() -> None:
    books = Books()
    earlier = books.checkpoint()
    of_before(earlier)
    books.position_changes = {"now": "2026-03-09T10:00:00Z"}
    report, earlier = books.audited_from(BEGUN, earlier)
    assert violated(report) == set(), report.lines()
    asked_again(books)
    report, _ = books.audited_from(BEGUN, earlier)
    assert violated(report) == set(), report.lines()


def letters_are_gone(books: Books) -> None:
    letters = topics.dead_letters_of(topics.CALL_USAGE)
    books.records[letters] = []
    books.starts = {letters: 1}


def test_where_nothing_at_all_is_left_what_comes_later_is_seen() -> None:
    books = Books()
    letters_are_gone(books)
    earlier = books.checkpoint()
    books.position_changes = {"now": LATER}
    later_ms = 1_776_000_000_000
    books.records[topics.CALL_USAGE].append(
        replace(record(topics.CALL_USAGE, 4, b"{broken"), timestamp=later_ms)
    )
    books.next[topics.CALL_USAGE] = 5
    letters = topics.dead_letters_of(topics.CALL_USAGE)
    report, _ = books.audited_from({**BEGUN, letters: 1}, earlier)
    assert violated(report) == {"at_least_once"}, report.lines()


def letters_were_never_there(books: Books) -> None:
    books.records[topics.dead_letters_of(topics.CALL_USAGE)] = []


@pytest.mark.parametrize(
    ("breach", "red"), [(letters_are_gone, set()), (letters_were_never_there, {"at_least_once"})]
)
def test_a_dead_letter_that_went_before_its_record_is_unknown(
    breach: Callable[[Books], None], red: set[str]
) -> None:
    books = Books()
    breach(books)
    report = books.audited()
    assert violated(report) == red, report.lines()
    assert red or report.exit_code == UNKNOWN


def test_a_command_that_contradicts_one_of_an_earlier_audit_is_rightly_refused() -> None:
    books = Books()
    books.command("settings", command_id="s1", expected_version=0)
    begun = {**BEGUN, topics.COMMAND: 2, topics.NOTIFICATION: 3}
    earlier = books.checkpoint()
    body = {"command": "settings", "command_id": "s1", "source": "cli", "issued_at": AT}
    other = record(topics.COMMAND, 2, body | {"expected_version": 1})
    books.records[topics.COMMAND].append(other)
    books.next[topics.COMMAND] = 3
    letter = books.letter(2, other.value or b"", "conflict")
    books.records[topics.dead_letters_of(topics.COMMAND)] = [replace(letter, offset=99)]
    books.tell("command_refused", command_id="s1", rule="conflict")
    report, _ = books.audited_from(begun, earlier)
    assert (violated(report), unknown(report)) == (set(), set()), report.lines()


def test_a_checkpoint_of_before_commands_were_kept_takes_what_stands_for_commanded() -> None:
    books = Books()
    books.command("settings", command_id="s1", expected_version=0)
    commanded_twice = books.records[topics.COMMAND][-1]
    books.set = {
        settled.DECKS: [["partners", datetime.fromisoformat(AT)]],
        settled.LICENCES: [["MCOMEETADV", None, [1_772_000_000_000_000, 2], []]],
        settled.POLICY: [1, *UNSET[settled.POLICY][1:]],
    }
    earlier = books.checkpoint()
    for known in earlier.values():
        for member in KEPT:
            del known[member]
    begun = {**BEGUN, topics.COMMAND: 2, topics.NOTIFICATION: 3}
    report, earlier = books.audited_from(begun, earlier)
    assert violated(report) == set(), report.lines()
    assert "settings" in unknown(report)

    books.records[topics.COMMAND].append(replace(commanded_twice, offset=2))
    books.next[topics.COMMAND] = 3
    books.tell("command_repeated", command_id="s1")
    report, _ = books.audited_from(begun, earlier)
    assert (violated(report), unknown(report)) == (set(), set()), report.lines()

    books.set |= {settled.DECKS: []}
    report, _ = books.audited_from(begun, earlier)
    assert (violated(report), unknown(report)) == (set(), {"settings"}), report.lines()
