"""Every invariant has a breach that turns it red; correct books turn none."""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from xxhash import xxh3_64_hexdigest

from schemas import topics
from streams.billing.parts import AccountRow, Hold
from streams.settings import Settings
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.prices import Deck
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.records import home, murmur2
from streams.testbed.auditor.rows import EXPOSURE, HELD
from streams.testbed.auditor.verdict import HOLDS, INVARIANTS, UNKNOWN, VIOLATED, Report
from streams.testbed.auditor.view import Options
from streams.testbed.load import VARIETIES, Variety
from tests.auditor.books import AT, DECK, NAMES, RECHARGE, TENANT, Books, record, usage, violated
from tests.billing.builders import NOW


def test_correct_books_hold() -> None:
    report = Books().audited()
    assert report.exit_code == HOLDS, report.lines()
    assert report.counts["entries"] == 3


def charged_twice(books: Books) -> None:
    books.entries.append(books.charge(4, 1, "e1", "-0.6", "148.8"))


def charged_twice_at_one_place(books: Books) -> None:
    books.entries.append(books.charge(4, 0, "e1", "-0.6", "148.8"))


def lost(books: Books) -> None:
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, usage("e9")))
    books.next[topics.CALL_USAGE] = 5


def booked_and_buried(books: Books) -> None:
    letters = books.records[topics.dead_letters_of(topics.CALL_USAGE)]
    raw = books.records[topics.CALL_USAGE][0].value or b""
    letters.append(books.letter(0, raw, "unrated"))


def altered_letter(books: Books) -> None:
    books.records[topics.dead_letters_of(topics.CALL_USAGE)] = [books.letter(2, b"{broker")]


def no_letter(books: Books) -> None:
    books.records[topics.dead_letters_of(topics.CALL_USAGE)] = []


def wrong_reason(books: Books) -> None:
    value = json.dumps(usage("e7"), separators=(",", ":")).encode()
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, value))
    books.next[topics.CALL_USAGE] = 5
    books.records[topics.dead_letters_of(topics.CALL_USAGE)].append(
        books.letter(4, value, "too_late")
    )


def conflict_unreported(books: Books) -> None:
    changed = record(topics.CALL_USAGE, 1, usage("e1", duration_s=600))
    books.records[topics.CALL_USAGE][1] = changed


def request_changed(books: Books) -> None:
    again = books.request(1, 1, RECHARGE, amount="51")
    books.records[topics.REQUESTED].append(record(topics.REQUESTED, 1, again))


def request_with_another_id(books: Books) -> None:
    again = books.request(1, 1, "made-up")
    books.records[topics.REQUESTED].append(record(topics.REQUESTED, 1, again))
    books.tell("recharge_requested", recharge_id="made-up")


def two_in_flight(books: Books) -> None:
    import uuid

    from tests.auditor.books import NAMESPACE, TENANT

    for epoch in (2, 3):
        derived = str(uuid.uuid5(NAMESPACE, f"{TENANT}/{epoch}/1"))
        books.records[topics.REQUESTED].append(
            record(topics.REQUESTED, epoch, books.request(epoch, 1, derived))
        )
        books.tell("recharge_requested", recharge_id=derived)


def resolved(books: Books, *, answer: str = "command_applied") -> None:
    """Nobody answered the second request; a person has said that it was not paid."""
    two_in_flight(books)
    name = json.loads(books.records[topics.REQUESTED][1].value or b"")["recharge_id"]
    books.command("resolve_recharge", answer=answer, recharge_id=name, paid=False)
    if answer == "command_applied":
        books.tell("recharge_resolved", recharge_id=name)


def resolved_too_early(books: Books) -> None:
    resolved(books, answer="command_refused")


def credited_twice(books: Books) -> None:
    cause = (topics.RESULT, 1, "pay", "r2")
    links = {"recharge_id": RECHARGE, "payment_id": "p1"}
    books.entries.append(books.entry(4, "recharge", "50", "199.4", cause, **links))
    books.records[topics.RESULT].append(record(topics.RESULT, 1, books.result("r2")))
    books.next[topics.RESULT] = 2


def not_credited(books: Books) -> None:
    other = books.result("r2", payment_id="p2", recharge_id="by-hand")
    books.records[topics.RESULT].append(record(topics.RESULT, 1, other))
    books.next[topics.RESULT] = 2


def unanswered(books: Books) -> None:
    del books.records[topics.NOTIFICATION][0]


def answered_twice(books: Books) -> None:
    books.records[topics.NOTIFICATION] *= 2


def gap(books: Books) -> None:
    books.entries[2]["seq"] = 4


def altered_byte(books: Books) -> None:
    books.tamper = lambda values: [
        value.replace(b'"usage_kind"', b'"usage_Kind"').replace(
            b'"source":"pbx"', b'"source":"PBX"'
        )
        for value in values
    ]
    books.records[topics.CALL_USAGE][0] = record(topics.CALL_USAGE, 0, usage("e1", source="PBX"))
    books.records[topics.CALL_USAGE][1] = record(topics.CALL_USAGE, 1, usage("e1", source="PBX"))
    request = books.request(1, 1, RECHARGE, caused_by="PBX/e1")
    books.records[topics.REQUESTED] = [record(topics.REQUESTED, 0, request)]


def wrong_price(books: Books) -> None:
    books.entries[1]["amount"], books.entries[1]["balance_after"] = "-0.7", "99.3"
    books.entries[2]["balance_after"] = "149.3"


def wrong_balance_after(books: Books) -> None:
    books.entries[1]["balance_after"] = "99"


def wrong_public_balance(books: Books) -> None:
    books.public_changes["balance"] = "149"


def row_behind(books: Books) -> None:
    books.row_changes[3] = 9


def wrong_digest(books: Books) -> None:
    books.position_changes["digest"] = "0" * 16


def wrong_row_count(books: Books) -> None:
    books.position_changes["rows"] = 2


def wrong_cause(books: Books) -> None:
    books.entries[0]["caused_by"]["id"] = "somebody-else"


def cause_not_there(books: Books) -> None:
    books.entries[0]["caused_by"]["offset"] = 7
    books.next[topics.COMMAND] = 8


def corrected(books: Books, **changes: Any) -> None:
    """The call of 0.60 was one of two minutes."""
    event = usage("fix", phase="correction", corrects="e1", duration_s=120)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, event))
    books.next[topics.CALL_USAGE] = 5
    cause = (topics.CALL_USAGE, 4, "pbx", "fix")
    links = {"corrects": "e1", "entry": 2}
    reversal = books.entry(4, "reversal", "0.6", "150", cause, links=links)
    charge = books.charge(5, 4, "fix", "-1.2", "148.8") | {"links": links}
    charge["rate"]["duration_s"] = 120
    books.entries += [reversal | changes, charge]


def reversed_wrongly(books: Books) -> None:
    corrected(books, amount="0.7", balance_after="150.1")
    books.entries[-1]["balance_after"] = "148.9"


def reversed_another_event(books: Books) -> None:
    corrected(books, links={"corrects": "e2", "entry": 2})


def reversed_no_charge(books: Books) -> None:
    corrected(books, links={"corrects": "e1", "entry": 3})


def reversed_what_nobody_says(books: Books) -> None:
    corrected(books, links=None)


def new_charge_without_links(books: Books) -> None:
    corrected(books)
    del books.entries[-1]["links"]


def corrected_without_reversal(books: Books) -> None:
    corrected(books)
    charge = books.charge(4, 4, "fix", "-1.2", "148.2")
    charge["rate"]["duration_s"] = 120
    books.entries[3:] = [charge | {"links": {"corrects": "e1"}}]


def corrected_twice(books: Books) -> None:
    corrected(books)
    event = usage("fix2", phase="correction", corrects="e1", duration_s=0)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 5, event))
    books.next[topics.CALL_USAGE] = 6
    cause = (topics.CALL_USAGE, 5, "pbx", "fix2")
    links = {"corrects": "e1", "entry": 2}
    books.entries.append(books.entry(6, "reversal", "0.6", "149.4", cause, links=links))


def corrected_what_never_was(books: Books) -> None:
    event = usage("fix", phase="correction", corrects="e99")
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, event))
    books.next[topics.CALL_USAGE] = 5
    charge = books.charge(4, 4, "fix", "-0.6", "148.8")
    books.entries.append(charge | {"links": {"corrects": "e99"}})


def correction_lost(books: Books) -> None:
    corrected(books)
    del books.entries[3:]


def reversal_lost(books: Books) -> None:
    event = usage("fix", phase="correction", corrects="e1", duration_s=0)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, event))
    books.next[topics.CALL_USAGE] = 5


def unreleased(books: Books) -> None:
    books.exposure = (600_000_000, 1)


def released_twice(books: Books) -> None:
    books.hold(one=(600_000_000, 100, False))
    books.exposure = (0, 0)


def outlived(books: Books) -> None:
    books.hold(one=(600_000_000, -61, False))
    books.exposure = (600_000_000, 1)


def living_on(books: Books) -> None:
    books.hold(one=(600_000_000, 181, False))
    books.exposure = (600_000_000, 1)


def ended_but_held(books: Books) -> None:
    books.hold(one=(600_000_000, 60, True))


def wrong_available(books: Books) -> None:
    books.public_changes = {"available": "149.4", "exposure": "1"}


def wrong_request_available(books: Books) -> None:
    request = books.request(1, 1, RECHARGE, balance="99.4", available="99.4", exposure="1")
    books.records[topics.REQUESTED] = [record(topics.REQUESTED, 0, request)]


def forgotten_in_the_sums(books: Books) -> None:
    books.hold(one=(600_000_000, 100, False))
    books.exposure = (600_000_000, 1)
    books.position_changes = {"holds": 0}


def held_for_nobody(books: Books) -> None:
    books.holds = {"one": (600_000_000, 100, False)}
    books.exposure = (600_000_000, 1)


def open_call_unsaid(books: Books) -> None:
    event = usage("e3", phase="progress", duration_s=None)
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, event))
    books.next[topics.CALL_USAGE] = 5


def correction_priced_wrongly(books: Books) -> None:
    corrected(books)
    books.entries[-1]["amount"], books.entries[-1]["balance_after"] = "-0.6", "149.4"


def refused_wrongly(books: Books) -> None:
    event = usage("fix", phase="correction", corrects="e1", duration_s=0)
    value = json.dumps(event, separators=(",", ":")).encode()
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, value))
    books.next[topics.CALL_USAGE] = 5
    letter = books.letter(4, value, "refused", failed_at="2026-03-02T10:05:00Z")
    books.records[topics.dead_letters_of(topics.CALL_USAGE)].append(letter)


def by_command(seq: int, kind: str, amount: str, after: str, **more: Any) -> dict[str, Any]:
    return Books.entry(seq, kind, amount, after, (topics.COMMAND, 1, "cli", "a1"), **more)


FIVE = {"amount": "5", "currency": "USD"}


def adjusted(books: Books) -> None:
    books.command(
        "adjustment", by_command(4, "adjustment", "5", "154.4"), amount=FIVE, reason="gift"
    )


def paid_elsewhere(books: Books) -> None:
    entry = by_command(4, "purchase", "5", "154.4", payment_id="px")
    books.command("book_payment", entry, amount=FIVE, payment_id="px")


def adjusted_by_more(books: Books) -> None:
    adjusted(books)
    books.entries[-1] |= {"amount": "500", "balance_after": "649.4"}


def adjusted_twice(books: Books) -> None:
    adjusted(books)
    books.entries.append(by_command(5, "adjustment", "5", "159.4"))


def adjusted_by_nothing(books: Books) -> None:
    adjusted(books)
    del books.entries[-1]


def adjusted_though_refused(books: Books) -> None:
    adjusted(books)
    refused = {"notice": "command_refused", "command_id": "a1", "at": AT}
    books.records[topics.NOTIFICATION][-1] = record(topics.NOTIFICATION, 1, refused)


def decided_twice(books: Books) -> None:
    """The same command once more, with money once more."""
    adjusted(books)
    again = msgspec.structs.replace(books.records[topics.COMMAND][-1], offset=2)
    books.records[topics.COMMAND].append(again)
    books.next[topics.COMMAND] = 3
    books.records[topics.NOTIFICATION].append(books.records[topics.NOTIFICATION][-1])
    cause = (topics.COMMAND, 2, "cli", "a1")
    books.entries.append(books.entry(5, "adjustment", "5", "159.4", cause))


def taken_for_a_repeat(books: Books) -> None:
    books.command("adjustment", answer="command_repeated", amount=FIVE, reason="gift")


def payment_booked_as_more(books: Books) -> None:
    paid_elsewhere(books)
    books.entries[-1] |= {"amount": "500", "balance_after": "649.4"}


def payment_booked_as_another(books: Books) -> None:
    paid_elsewhere(books)
    books.entries[-1]["payment_id"] = "py"


def payment_never_booked(books: Books) -> None:
    paid_elsewhere(books)
    del books.entries[-1]


def opened_with_more(books: Books) -> None:
    opened = json.loads(books.records[topics.COMMAND][0].value or b"")
    books.records[topics.COMMAND][0] = record(topics.COMMAND, 0, opened | {"opening_balance": "9"})


def settings_with_money(books: Books) -> None:
    books.command("settings", by_command(4, "adjustment", "5", "154.4"), expected_version=0)


def another_lot_voided(books: Books) -> None:
    gone = {"id": "g1", "amount": "-149.4", "left": "0"}
    entry = by_command(4, "void", "-149.4", "0", grants=[gone])
    books.command("void", entry, grant_id="g2", reason="x")
    books.row_changes[6] = []


def a_tick_with_money(books: Books) -> None:
    books.entries.append(books.entry(4, "adjustment", "500", "649.4", ("tick", -1, "tick", AT)))


def a_call_with_money(books: Books) -> None:
    cause = (topics.CALL_USAGE, 0, "pbx", "e1")
    books.entries.append(books.entry(4, "adjustment", "500", "649.4", cause))


def a_free_call_that_takes_money(books: Books) -> None:
    cause = (topics.CALL_USAGE, 3, "pbx", "e2")
    books.entries.append(books.entry(4, "adjustment", "-100", "49.4", cause))


def a_result_with_more_money(books: Books) -> None:
    cause = (topics.RESULT, 0, "pay", "r1")
    books.entries.append(books.entry(4, "adjustment", "500", "649.4", cause))


def a_result_without_its_payment(books: Books) -> None:
    del books.entries[2]["payment_id"]


def a_correction_that_voids(books: Books) -> None:
    corrected(books)
    cause = (topics.CALL_USAGE, 4, "pbx", "fix")
    gone = {"id": "g1", "amount": "-148.8", "left": "0"}
    books.entries.append(books.entry(6, "void", "-148.8", "0", cause, grants=[gone]))
    books.row_changes[6] = []


def credited_from_another_currency(books: Books) -> None:
    yen = books.result("r1", amount={"amount": "50", "currency": "JPY"})
    books.records[topics.RESULT] = [record(topics.RESULT, 0, yen)]


def adjusted_in_another_currency(books: Books) -> None:
    entry = by_command(4, "adjustment", "5", "154.4")
    books.command("adjustment", entry, amount={"amount": "5", "currency": "JPY"}, reason="x")


def booked_in_another_currency(books: Books) -> None:
    books.entries[1]["currency"] = "EUR"


def published_in_another_currency(books: Books) -> None:
    books.public_changes["currency"] = "EUR"


LATER = "2026-03-02T10:05:00Z"
CALL = json.dumps(usage("e7"), separators=(",", ":")).encode()
PAID = json.dumps(
    Books.result("r2", payment_id="p2", recharge_id="by-hand"), separators=(",", ":")
).encode()
ASKED = json.dumps(
    {"command": "adjustment", "command_id": "a1", "source": "cli", "issued_at": AT,
     "amount": FIVE, "reason": "gift"}
).encode()  # fmt: skip


def refused(books: Books, topic: str, value: bytes, reason: str) -> None:
    """A record as the last of its topic, and its dead letter."""
    offset = books.next[topic]
    books.records[topic].append(record(topic, offset, value))
    books.next[topic] = offset + 1
    letter = record(
        topics.dead_letters_of(topic), 0, value,
        credits_dlq_partition="0", credits_dlq_offset=str(offset), credits_dlq_reason=reason,
        credits_dlq_path="$", credits_dlq_failed_at=LATER,
    )  # fmt: skip
    books.records.setdefault(topics.dead_letters_of(topic), []).append(letter)
    if (topic, reason) == (topics.COMMAND, "conflict"):
        answer = {"notice": "command_refused", "command_id": "a1", "rule": "conflict"}
        books.records[topics.NOTIFICATION].append(record(topics.NOTIFICATION, 1, answer))


OF_ALL = ["malformed_json", "schema_violation", "key_mismatch", "wrong_partition", "conflict"]
WRONGLY = [
    (topics.CALL_USAGE, CALL, [
        *OF_ALL, "unknown_tenant", "currency_mismatch", "not_billable", "too_late",
        "from_the_future", "refused", "unrated", "bad_luck",
    ]),
    (topics.RESULT, PAID, [
        *OF_ALL, "unknown_tenant", "currency_mismatch", "too_late", "from_the_future", "refused",
        "not_billable", "unrated", "bad_luck",
    ]),
    (topics.COMMAND, ASKED, [
        *OF_ALL, "unknown_tenant", "currency_mismatch", "too_late", "refused", "overflow",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("topic", "value", "reason"),
    [(topic, value, reason) for topic, value, reasons in WRONGLY for reason in reasons],
)
def test_a_sound_record_may_not_be_refused(topic: str, value: bytes, reason: str) -> None:
    books = Books()
    refused(books, topic, value, reason)
    report = books.audited()
    assert violated(report) == {"at_least_once"}, report.lines()


@pytest.mark.parametrize(
    ("topic", "value", "reason"),
    [
        (topics.CALL_USAGE, CALL, "defect"),
        (topics.CALL_USAGE, CALL, "overflow"),
        (topics.RESULT, PAID, "defect"),
        (topics.RESULT, PAID, "overflow"),
        (topics.COMMAND, ASKED, "defect"),
    ],
)
def test_a_refusal_that_the_topics_cannot_explain_is_unknown(
    topic: str, value: bytes, reason: str
) -> None:
    books = Books()
    refused(books, topic, value, reason)
    report = books.audited()
    assert report.exit_code == UNKNOWN, report.lines()
    assert report.findings["at_least_once"].unknown


def a_value(text: bytes, old: bytes, new: bytes) -> bytes:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("topic", "value", "reason"),
    [
        (topics.CALL_USAGE, a_value(CALL, b'"e7"', b'"e1","currency":"USD"'), "conflict"),
        (topics.CALL_USAGE, a_value(CALL, b'"e7"', b'"e7","currency":"EUR"'), "currency_mismatch"),
        (topics.CALL_USAGE, a_value(CALL, b"60}", b'"60"}'), "schema_violation"),
        (topics.CALL_USAGE, a_value(CALL, b"60}", b"null}"), "schema_violation"),
        (topics.CALL_USAGE, a_value(CALL, b'"pbx"', b'""'), "schema_violation"),
        (topics.RESULT, a_value(PAID, b'"r2"', b'"r1"'), "conflict"),
        (topics.RESULT, a_value(PAID, b'"50"', b'"-50"'), "schema_violation"),
        (topics.RESULT, a_value(PAID, b"USD", b"JPY"), "currency_mismatch"),
        (topics.RESULT, a_value(PAID, b"2026", b"2024"), "too_late"),
        (topics.RESULT, a_value(PAID, b"2026", b"2027"), "from_the_future"),
        (topics.COMMAND, a_value(ASKED, b'"gift"', b"7"), "schema_violation"),
        (topics.COMMAND, b"{", "malformed_json"),
    ],
)
def test_a_record_that_is_rightly_refused_is_sound_books(
    topic: str, value: bytes, reason: str
) -> None:
    books = Books()
    refused(books, topic, value, reason)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


@pytest.mark.parametrize("variety", VARIETIES, ids=lambda one: one.name)
def test_every_variety_of_nonsense_is_rightly_refused(variety: Variety) -> None:
    if variety.reason is None:
        return
    books = Books()
    key, value = variety.make(usage("odd"), TENANT.encode())
    refused(books, topics.CALL_USAGE, value or b"", variety.reason.value)
    for topic in (topics.CALL_USAGE, topics.dead_letters_of(topics.CALL_USAGE)):
        last = books.records[topic][-1]
        books.records[topic][-1] = msgspec.structs.replace(last, key=key, value=value)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_a_member_that_a_command_does_not_know_says_nothing() -> None:
    books = Books()
    entry = by_command(4, "adjustment", "5", "154.4")
    books.command("adjustment", entry, amount=FIVE, reason="gift", payment_id="px")
    assert books.audited().exit_code == HOLDS


def test_a_tenant_that_was_opened_afterwards_was_unknown() -> None:
    books = Books()
    refused(books, topics.CALL_USAGE, CALL, "unknown_tenant")
    for entry in books.entries:
        entry["booked_at"] = "2026-03-02T10:06:00Z"
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


@pytest.mark.parametrize(("closed_at", "exit_code"), [
    ("2026-03-02T09:00:00Z", HOLDS),
    ("2026-03-02T10:04:00Z", VIOLATED),
])  # fmt: skip
def test_what_a_closing_stops_is_usage_that_began_after_it(closed_at: str, exit_code: int) -> None:
    books = Books()
    books.command("close_tenant")
    books.records[topics.NOTIFICATION].pop()
    books.tell("command_applied", command_id="a1", at=closed_at)
    refused(books, topics.CALL_USAGE, CALL, "not_billable")
    report = books.audited()
    assert report.exit_code == exit_code, report.lines()


def test_what_strayed_is_judged_by_its_own_partition_only() -> None:
    partitions = next(n for n in range(2, 99) if home(TENANT.encode(), n) == 0)
    names = (f"t{number}" for number in range(99))
    stranger = next(name for name in names if home(name.encode(), partitions) != 0)
    books = Books()
    value = json.dumps(usage("e7", tenant_id=stranger), separators=(",", ":")).encode()
    refused(books, topics.CALL_USAGE, value, "unknown_tenant")
    for topic in (topics.CALL_USAGE, topics.dead_letters_of(topics.CALL_USAGE)):
        strayed = msgspec.structs.replace(books.records[topic][-1], key=stranger.encode())
        books.records[topic][-1] = strayed
    assert books.audited().exit_code == HOLDS
    assert violated(books.audited(partitions)) == {"at_least_once"}


def test_a_conflict_with_what_has_left_its_topic_is_unknown() -> None:
    books = Books()
    refused(books, topics.CALL_USAGE, CALL, "conflict")
    books.starts = {topics.CONFERENCE_USAGE: 1}
    report = books.audited()
    assert report.exit_code == UNKNOWN, report.lines()


@pytest.mark.parametrize("topic", [topics.COMMAND, topics.RESULT])
def test_what_is_no_event_is_a_dead_letter(topic: str) -> None:
    books = Books()
    books.records[topic].append(record(topic, 1, b"{"))
    books.next[topic] = 2
    assert violated(books.audited()) == {"at_least_once"}


def sums_of_before(books: Books) -> None:
    books.position_changes["balances"] = {"USD": ["1", "0"]}


def with_marks(books: Books) -> None:
    """The position row says which record of each source was the last, as the engine's does."""
    books.position_changes["sources"] = {
        topic: {
            "next": books.next[topic],
            "last": found[-1].offset,
            "hash": xxh3_64_hexdigest((found[-1].key or b"") + b"\0" + (found[-1].value or b"")),
        }
        for topic, found in books.records.items()
        if topic in books.next
    }


def another_record_in_its_place(books: Books) -> None:
    with_marks(books)
    books.records[topics.CALL_USAGE][3] = record(topics.CALL_USAGE, 3, usage("e3", kind="free"))


def test_the_last_record_that_was_booked_is_there() -> None:
    books = Books()
    with_marks(books)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_a_source_that_was_not_read_as_far_as_it_was_booked_is_unknown() -> None:
    books = Books()
    with_marks(books)
    del books.records[topics.CALL_USAGE][3:]
    report = books.audited()
    assert report.exit_code == UNKNOWN, report.lines()
    assert report.findings["at_least_once"].unknown
    # Unless it has left the topic, or an earlier audit has read it.
    books.starts = {topics.CALL_USAGE: 4}
    assert not any("as far" in why for why in books.audited().findings["at_least_once"].unknown)
    books.starts = {}
    report, _ = books.audited_from(books.next, Books().checkpoint())
    assert not report.findings["at_least_once"].unknown, report.lines()


@pytest.mark.parametrize("kept", [topics.LEDGER, topics.dead_letters_of(topics.CALL_USAGE)])
def test_an_empty_changelog_beside_what_was_booked_is_unknown(kept: str) -> None:
    log = Books().log()
    log.rows = {}
    log.records = {topic: log.records[topic] if topic == kept else () for topic in log.records}
    report, _ = audit([log], names=NAMES, partitions=1, deck=DECK)
    assert report.exit_code == UNKNOWN, report.lines()
    assert report.findings["changelog"].unknown


def test_a_changelog_that_has_gone_since_the_last_audit_is_noticed() -> None:
    earlier = Books().checkpoint()
    log = Books().log()
    log.rows, log.records = {}, dict.fromkeys(log.records, ())
    report, _ = audit([log], names=NAMES, partitions=1, deck=DECK, earlier=earlier)
    assert "changelog" in violated(report)


def test_where_nothing_was_ever_booked_the_books_hold() -> None:
    log = Books().log()
    log.rows = {}
    log.records = {
        topic: found if topic in topics.SOURCES else () for topic, found in log.records.items()
    }
    report, _ = audit([log], names=NAMES, partitions=1, deck=DECK)
    assert report.exit_code == HOLDS, report.lines()


BREACHES: list[tuple[Callable[[Books], None], set[str]]] = [
    (charged_twice, {"at_most_once"}),
    (charged_twice_at_one_place, {"at_most_once"}),
    (lost, {"at_least_once"}),
    (booked_and_buried, {"at_least_once"}),
    (altered_letter, {"at_least_once"}),
    (no_letter, {"at_least_once"}),
    (wrong_reason, {"at_least_once"}),
    (conflict_unreported, {"at_least_once"}),
    (request_changed, {"one_request"}),
    (request_with_another_id, {"one_request"}),
    (two_in_flight, {"one_request"}),
    (resolved_too_early, {"one_request"}),
    (credited_twice, {"credit_once"}),
    (not_credited, {"credit_once"}),
    (unanswered, {"answered"}),
    (answered_twice, {"answered"}),
    (gap, {"sequence"}),
    (altered_byte, {"chain"}),
    (wrong_price, {"price"}),
    (wrong_balance_after, {"conservation"}),
    (wrong_public_balance, {"conservation"}),
    (row_behind, {"changelog"}),
    (wrong_digest, {"changelog"}),
    (unreleased, {"holds"}),
    (released_twice, {"holds"}),
    (outlived, {"holds"}),
    (living_on, {"holds"}),
    (ended_but_held, {"holds"}),
    (wrong_available, {"holds"}),
    (wrong_request_available, {"holds"}),
    (forgotten_in_the_sums, {"holds"}),
    (held_for_nobody, {"holds"}),
    (open_call_unsaid, {"at_least_once"}),
    (wrong_row_count, {"changelog"}),
    (wrong_cause, {"cause"}),
    (cause_not_there, {"cause"}),
    (reversed_wrongly, {"correction"}),
    (reversed_another_event, {"correction"}),
    (reversed_no_charge, {"correction"}),
    (reversed_what_nobody_says, {"correction"}),
    (new_charge_without_links, {"correction"}),
    (corrected_without_reversal, {"correction"}),
    (corrected_twice, {"correction"}),
    (corrected_what_never_was, {"correction"}),
    (correction_lost, {"at_least_once"}),
    (reversal_lost, {"at_least_once"}),
    (correction_priced_wrongly, {"price"}),
    (refused_wrongly, {"at_least_once"}),
    (adjusted_by_more, {"cause"}),
    (adjusted_twice, {"cause"}),
    (adjusted_by_nothing, {"cause"}),
    (decided_twice, {"at_most_once"}),
    (taken_for_a_repeat, {"answered"}),
    (adjusted_though_refused, {"cause"}),
    (payment_booked_as_more, {"cause"}),
    (payment_booked_as_another, {"cause"}),
    (payment_never_booked, {"cause"}),
    (opened_with_more, {"cause"}),
    (settings_with_money, {"cause"}),
    (another_lot_voided, {"cause"}),
    (a_tick_with_money, {"cause"}),
    (a_call_with_money, {"cause"}),
    (a_free_call_that_takes_money, {"cause"}),
    (a_result_with_more_money, {"cause"}),
    (a_result_without_its_payment, {"cause", "credit_once"}),
    (a_correction_that_voids, {"cause"}),
    (credited_from_another_currency, {"credit_once"}),
    (adjusted_in_another_currency, {"cause"}),
    (booked_in_another_currency, {"conservation"}),
    (published_in_another_currency, {"conservation"}),
    (sums_of_before, {"changelog"}),
    (another_record_in_its_place, {"at_least_once"}),
]


@pytest.mark.parametrize(
    ("breach", "expected"), BREACHES, ids=[breach.__name__ for breach, _ in BREACHES]
)
def test_a_breach_turns_its_invariant_red_and_no_other(
    breach: Callable[[Books], None], expected: set[str]
) -> None:
    books = Books()
    breach(books)
    report = books.audited()
    assert violated(report) == expected, report.lines()
    assert report.exit_code == VIOLATED


@pytest.mark.parametrize("sound", [adjusted, paid_elsewhere])
def test_what_a_command_asks_for_is_sound(sound: Callable[[Books], None]) -> None:
    books = Books()
    sound(books)
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_open_calls_hold_money() -> None:
    books = Books()
    books.hold(one=(600_000_000, 100, False), two=(1_200_000_000, 180, False), ended=(0, 5, True))
    books.exposure = (1_800_000_000, 2)
    books.public_changes = {"available": "147.6", "exposure": "1.8"}
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()
    assert report.counts["holds"] == 2


def test_the_place_of_exposures_in_a_row_is_where_rows_have_it() -> None:
    members = AccountRow.__struct_fields__
    assert members[EXPOSURE : HELD + 1] == ("exposure_nanos", "holds")
    assert msgspec.structs.asdict(Hold(nanos=1, elapsed_s=2, until=NOW)) == {
        "version": 1, "nanos": 1, "elapsed_s": 2, "until": NOW, "ended": False,
    }  # fmt: skip


def test_a_persons_word_is_an_answer_like_any_other() -> None:
    books = Books()
    resolved(books)
    assert violated(books.audited()) == set()


def test_a_correction_and_its_repeat_hold() -> None:
    books = Books()
    corrected(books)
    again = books.records[topics.CALL_USAGE][-1].value
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 5, again))
    books.next[topics.CALL_USAGE] = 6
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()


def test_every_invariant_can_turn_red() -> None:
    covered = {name for _, names in BREACHES for name in names}
    # These have tests of their own, here and in other files.
    apart = {"partition", "stable", "expectation", "lots", "pools", "recharge", "settings"}
    assert covered | apart == set(INVARIANTS)


def test_records_on_a_partition_of_another_key_are_noticed() -> None:
    assert "partition" in violated(Books().audited(partitions=7))


def test_a_strayed_record_that_never_arrives_is_noticed() -> None:
    key = next(
        name.encode()
        for name in (f"t-{number}" for number in range(99))
        if home(name.encode(), 2) == 1
    )
    books = Books()
    home_key = b"contoso"
    assert home(home_key, 2) in (0, 1)
    if home(home_key, 2) != 0:
        pytest.skip("the books' tenant does not belong to partition 0 of 2")
    event = usage("strayed", tenant_id=key.decode())
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, event, key=key))
    books.next[topics.CALL_USAGE] = 5
    assert "partition" in violated(books.audited(partitions=2))


def test_what_lies_beyond_the_position_is_pending() -> None:
    books = Books()
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 4, usage("e9")))
    report = books.audited()
    assert report.exit_code == HOLDS
    assert report.counts["pending"] == 1


def test_a_trimmed_source_is_unknown_and_never_a_pass() -> None:
    books = Books()
    books.records[topics.COMMAND] = []
    del books.records[topics.NOTIFICATION][0]
    books.starts = {topics.COMMAND: 1}
    report = books.audited()
    assert report.exit_code == UNKNOWN
    assert report.findings["cause"].unknown


def refunded(books: Books) -> None:
    """A part of the recharge is paid back; of results nothing but that is left."""
    refund = books.result("r2", status="refunded", amount={"amount": "20", "currency": "USD"})
    books.records[topics.RESULT] = [record(topics.RESULT, 1, refund)]
    books.entries.append(
        books.entry(
            4, "refund", "-20", "129.4", (topics.RESULT, 1, "pay", "r2"),
            recharge_id=RECHARGE, payment_id="p1",
        )
    )  # fmt: skip
    books.next[topics.RESULT] = 2


def results_are_gone(books: Books) -> None:
    books.records[topics.RESULT] = []
    books.starts = {topics.RESULT: 1}


def the_first_result_of_two_is_gone(books: Books) -> None:
    results_are_gone(books)
    refunded(books)


def what_was_asked_for_is_gone(books: Books) -> None:
    books.records[topics.REQUESTED] = []
    books.records[topics.RESULT] = [record(topics.RESULT, 0, books.result("r1", amount=None))]
    books.starts = {topics.REQUESTED: 1}


@pytest.mark.parametrize(
    "trim", [results_are_gone, the_first_result_of_two_is_gone, what_was_asked_for_is_gone]
)
def test_a_payment_of_which_something_is_gone_is_unknown_and_no_violation(
    trim: Callable[[Books], None],
) -> None:
    books = Books()
    trim(books)
    report = books.audited()
    assert report.exit_code == UNKNOWN
    assert report.findings["credit_once"].unknown


@pytest.mark.parametrize(
    ("status", "amount", "kind", "gone"),
    [
        ("refunded", {"amount": "2", "currency": "USD"}, "refund", "-2"),
        ("dispute_opened", None, "dispute_opened", "-5"),
    ],
)
@pytest.mark.parametrize("right", [True, False])
def test_a_payment_that_was_booked_by_hand_may_go_back_by_a_result(
    status: str, amount: Any, kind: str, gone: str, right: bool
) -> None:
    books = Books()
    paid_elsewhere(books)
    back = books.result("r2", status=status, amount=amount, payment_id="px", recharge_id="theirs")
    books.records[topics.RESULT].append(record(topics.RESULT, 1, back))
    books.next[topics.RESULT] = 2
    gone = gone if right else "-1"
    after = f"{154.4 + float(gone):.1f}"
    cause = (topics.RESULT, 1, "pay", "r2")
    books.entries.append(
        books.entry(5, kind, gone, after, cause, recharge_id="theirs", payment_id="px")
    )
    assert violated(books.audited()) == (set() if right else {"credit_once"})


def test_a_record_that_is_replayed_and_refused_again_keeps_its_bytes() -> None:
    books = Books()
    books.records[topics.CALL_USAGE][2] = record(
        topics.CALL_USAGE, 2, b"{broken", credits_dlq_attempt="2", traceparent="00-1-2-01"
    )
    [letter] = books.records[topics.dead_letters_of(topics.CALL_USAGE)]
    again = (*letter.headers, ("credits-dlq-attempt", b"2"))
    kinds: list[tuple[tuple[tuple[str, bytes], ...], set[str]]]
    kinds = [((("traceparent", b"00-1-2-01"),), set()), ((), {"at_least_once"})]
    for kept, red in kinds:
        books.records[letter.topic] = [msgspec.structs.replace(letter, headers=(*kept, *again))]
        assert violated(books.audited()) == red


def test_an_answer_that_may_be_gone_is_unknown_and_one_that_cannot_be_is_missing() -> None:
    books = Books()
    two_in_flight(books)
    results_are_gone(books)
    assert books.audited().findings["one_request"].unknown
    books = Books()
    two_in_flight(books)
    books.starts = {topics.RESULT: 1}
    # What is left begins before anything was asked for.
    assert violated(books.audited()) == {"one_request"}
    [only] = books.records[topics.RESULT]
    # And after it.
    books.records[topics.RESULT] = [msgspec.structs.replace(only, timestamp=2_000_000_000_000)]
    assert books.audited().findings["one_request"].unknown


def test_a_deck_that_is_not_at_hand_is_unknown() -> None:
    other = Deck(
        b"Destination Name,Destination Type,Country,Prefix,Price / min\nA,m,GB,4420,0.60\n"
    )
    report, _ = audit(
        [Books().log()],
        names={topic.name: topic.name for topic in topics.MANIFEST},
        partitions=1,
        deck=other,
    )
    assert report.exit_code == UNKNOWN
    assert report.findings["price"].unknown


@pytest.mark.parametrize(("prefix", "known"), [("44xx", True), ("45xx", False), ("44xxx", False)])
def test_a_masked_prefix_is_priced_by_a_row_it_may_stand_for(prefix: str, known: bool) -> None:
    books = Books()
    books.entries[1]["rate"]["prefix"] = prefix
    assert ("price" not in violated(books.audited())) is known


def test_a_masked_prefix_with_another_price_is_noticed() -> None:
    books = Books()
    books.entries[1]["rate"] |= {"prefix": "44xx", "duration_s": 600}
    assert "price" in violated(books.audited())


@pytest.mark.parametrize(
    ("foreseen", "holds"),
    [
        ({"by_reason": {"malformed_json": 1}, "distinct_ids": 2}, True),
        ({"by_reason": {"malformed_json": 2}, "distinct_ids": 2}, False),
        ({"by_reason": {}, "distinct_ids": 3}, False),
    ],
)
def test_what_a_load_foresaw_is_compared(
    foreseen: dict[str, object], holds: bool, tmp_path: Path
) -> None:
    path = tmp_path / "expectation.json"
    path.write_text(json.dumps(foreseen))
    report = Books().audited(options=Options(expect=path))
    assert ("expectation" not in violated(report)) is holds


async def test_a_broker_that_is_away_is_unknown() -> None:
    report = await verify(Settings(broker="127.0.0.1:1"), Options())
    assert report.exit_code == UNKNOWN


def test_a_duration_of_thirty_digits_is_priced_at_once() -> None:
    row = {"Price / min": "0.60", "Initial increment": "30", "Increment": "6"}
    assert DECK.cost(row, 31) == 360_000_000
    assert DECK.cost(row, 30) == DECK.cost(row, 1) == 300_000_000
    assert DECK.cost(row, 10**30) == 10**37 + 20_000_000


def test_own_arithmetic_agrees_with_the_published_figures() -> None:
    deck = Deck(
        b"Destination Name,Destination Type,Country,Prefix,Price / min,Connect fee,"
        b"Initial increment,Increment,Rounding\n"
        b"A,m,GB,4420,0.015,0,30,6,\nB,m,ZW,263,0.223,0.05,60,60,\nC,m,US,1,0.015,0,1,1,up/2\n"
    )
    for prefix, seconds, cost in (("4420", 219, 55_500_000), ("263", 600, 2_280_000_000)):
        assert deck.cost(deck.rows[prefix], seconds) == cost
    assert deck.cost(deck.rows["1"], 219) == 60_000_000
    assert deck.cost(deck.rows["1"], 0) == 0
    assert deck.find("12125550123") == ("1", deck.rows["1"])
    assert DECK.find("99") is None


@pytest.mark.parametrize(
    ("key", "hashed"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)],
)
def test_the_key_hash_is_kafkas(key: bytes, hashed: int) -> None:
    assert murmur2(key) == hashed & 0xFFFFFFFF


AUDITED: Mapping[str, int] = {topics.LEDGER: 3, topics.REQUESTED: 1, topics.RESULT: 1}


def credited_again(books: Books) -> None:
    books.entries.append(
        books.entry(
            4, "recharge", "50", "199.4", (topics.RESULT, 0, "pay", "r1"),
            recharge_id=RECHARGE, payment_id="p1",
        )
    )  # fmt: skip


def credited_though_never_asked_for(books: Books) -> None:
    unasked = books.result("r2", recharge_id=str(uuid.uuid4()), payment_id="p2", amount=None)
    books.records[topics.RESULT].append(record(topics.RESULT, 1, unasked))
    books.next[topics.RESULT] = 2
    books.entries.append(
        books.entry(
            4, "recharge", "50", "199.4", (topics.RESULT, 1, "pay", "r2"), payment_id="p2",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("breach", "red"),
    [
        (credited_again, "credit_once"),
        (credited_though_never_asked_for, "credit_once"),
        (two_in_flight, "one_request"),
    ],
)
def test_what_an_earlier_audit_has_read_may_leave_its_topic(
    breach: Callable[[Books], None], red: str
) -> None:
    books = Books()
    earlier = books.checkpoint()
    breach(books)
    books.starts = {topics.REQUESTED: 1, topics.RESULT: 1}
    report, _ = books.audited_from(AUDITED, earlier)
    assert red in violated(report), report.lines()


@pytest.mark.parametrize("trim", [results_are_gone, what_was_asked_for_is_gone])
def test_what_was_gone_once_is_not_asked_for_again(trim: Callable[[Books], None]) -> None:
    books = Books()
    two_in_flight(books)
    trim(books)
    books.starts = {topics.REQUESTED: 1, topics.RESULT: 1}
    earlier = books.checkpoint()
    refunded(books)
    report, _ = books.audited_from({**AUDITED, topics.REQUESTED: 4}, earlier)
    for name in ("credit_once", "one_request"):
        assert not report.findings[name].unknown, report.lines()
        assert not report.findings[name].violations, report.lines()


def test_what_was_charged_before_a_checkpoint_is_corrected_after_it_and_only_once() -> None:
    books = Books()
    before = books.checkpoint()
    corrected(books)
    report, after = books.audited_from({topics.LEDGER: 3, topics.CALL_USAGE: 4}, before)
    assert report.exit_code == HOLDS, report.lines()
    # A repeat of the correction says nothing new; a second correction does.
    again = books.records[topics.CALL_USAGE][-1].value
    books.records[topics.CALL_USAGE].append(record(topics.CALL_USAGE, 5, again))
    books.next[topics.CALL_USAGE] = 6
    report, _ = books.audited_from({topics.LEDGER: 5, topics.CALL_USAGE: 5}, after)
    assert report.exit_code == HOLDS, report.lines()

    books = Books()
    corrected_twice(books)
    report, _ = books.audited_from({topics.LEDGER: 5, topics.CALL_USAGE: 5}, after)
    assert violated(report) == {"correction"}, report.lines()


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ("0.75", "upstream: 1 calls cost 0.75 USD there and 0.60 here, 1 of them more there"),
        ("0.006", "upstream: 1 calls cost 0.01 USD there and 0.60 here, 0 of them more there"),
        (None, None),
    ],
)
def test_what_carriers_say_is_summed_up_and_proves_nothing(
    told: str | None, line: str | None
) -> None:
    books = Books()
    calls = books.records[topics.CALL_USAGE]
    for at in (0, 1):
        calls[at] = record(topics.CALL_USAGE, at, usage("e1", upstream_charge=told))
    report = books.audited()
    assert report.exit_code == HOLDS, report.lines()
    shown = [one for one in report.lines() if one.startswith("upstream")]
    assert shown == ([line] if told else [])
    said = {"USD": {"calls": 1, "told": told, "charged": "0.6", "dearer": int(told == "0.75")}}
    assert report.to_json()["upstream"] == (said if told else {})


@pytest.mark.parametrize("told", [0.5, "a little", "0.0123456789"])
def test_what_is_no_amount_had_to_be_refused(told: Any) -> None:
    books = Books()
    for at in (0, 1):
        call = record(topics.CALL_USAGE, at, usage("e1", upstream_charge=told))
        books.records[topics.CALL_USAGE][at] = call
    assert violated(books.audited()) == {"at_least_once"}


def test_what_several_could_not_be_checked_for_is_said_once_below_the_last() -> None:
    report = Report()
    for name in ("conservation", "lots", "at_most_once", "at_least_once"):
        report.unknown(name, "the topics cannot be read")
    report.violate("at_most_once", "twice")
    report.unknown("chain", "the ledger is trimmed")
    said = [line.partition(":")[0] for line in report.lines()]
    assert said[:6] == [
        "unknown   conservation",
        "unknown   lots",
        "          - the topics cannot be read",
        "VIOLATED  at_most_once",
        "          - twice",
        "unknown   at_least_once",
    ]
    assert said[6] == "          - the topics cannot be read"
    assert said.count("          - the ledger is trimmed") == 1
    report = Report()
    for name in report.findings:
        report.unknown(name, "the topics cannot be read")
    said = report.lines()
    assert said.count("          - the topics cannot be read") == 1
