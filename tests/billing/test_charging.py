"""From a usage event to a ledger entry: who pays, what is refused, what stands in the books."""

from datetime import timedelta

import pytest

from schemas.nanos import NANOS
from schemas.notices import DeadLetterReason
from schemas.usage import CallUsage, Kind, Phase
from streams.billing import coverage, ledger
from streams.billing.legs import usage_event
from streams.billing.outcomes import Terms
from streams.billing.rates import Rate, Tariff
from tests.billing.builders import (
    LONDON,
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    an_account,
    apply,
    closing,
    decoded,
    minutes,
    opening,
    usd,
)


def test_a_call_is_charged_and_says_how() -> None:
    outcome = apply(an_account("10"), minutes(3))
    entry = decoded(outcome.entries[0])
    assert outcome.label == "charged"
    assert outcome.account is not None
    assert outcome.account.balance_nanos == usd("7")
    assert (entry["amount"], entry["balance_after"], entry["seq"]) == ("-3", "7", 2)
    assert entry["rate"]["prefix"] == "4420"
    assert (entry["rate"]["billed_s"], entry["rate"]["duration_s"]) == (180, 180)


def test_a_number_that_is_a_prefix_of_the_deck_is_masked_as_well() -> None:
    rate = Rate(prefix=LONDON[1:], per_minute=NANOS, per_minute_text="1")
    terms = Terms(tariff=Tariff("default", "file-test", {LONDON[1:]: rate}))
    entry = ledger.apply(an_account("10"), a_call(), terms, NOW).entries[0]
    assert LONDON[1:].encode() not in entry
    assert decoded(entry)["callee"] == "+44207946xxxx"
    assert decoded(entry)["rate"]["prefix"] == "44207946xxxx"


@pytest.mark.parametrize(
    ("prefix", "digits", "shown"),
    [
        ("4420", "442079460018", "+4420xxxxxxxx"),
        ("44207946001", "442079460018", "+44207946001x"),
        ("112", "112", "+xxx"),
        ("11223", "11223", "+1xxxx"),
    ],
)
def test_a_masked_number_is_never_whole(prefix: str, digits: str, shown: str) -> None:
    assert coverage.masked(prefix, digits) == shown


def test_the_number_dialled_is_nowhere_in_the_books() -> None:
    outcome = apply(an_account("10"), a_call())
    assert LONDON[1:].encode() not in outcome.entries[0]
    assert decoded(outcome.entries[0])["callee"] == "+4420xxxxxxxx"


@pytest.mark.parametrize("kind", sorted(coverage.FREE_KINDS))
def test_free_kinds_move_no_money(kind: Kind) -> None:
    outcome = apply(an_account("10"), a_call(kind=kind, callee=None))
    assert (outcome.label, outcome.entries) == ("free", ())


@pytest.mark.parametrize("kind", sorted(set(Kind) - coverage.FREE_KINDS))
def test_all_other_kinds_draw_on_credits(kind: Kind) -> None:
    assert apply(an_account("10"), a_call(kind=kind)).label == "charged"


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"call_type": "user_in"}, Kind.FREE),
        ({"call_type": "user_in", "number_type": "toll_free"}, Kind.TOLL_FREE_IN),
        ({"call_type": "ucap_in", "number_type": "TollFree"}, Kind.TOLL_FREE_IN),
        ({"call_type": "user_out"}, Kind.OVERAGE_DOMESTIC),
        ({"call_type": "user_out", "capability": "MCOPSTN2"}, Kind.INTERNATIONAL),
        ({"call_type": "user_out_transfer", "capability": "MCOPSTNPP"}, Kind.PAYG_OUT),
        ({"call_type": "conf_in"}, Kind.CONF_DIAL_IN),
        ({"call_type": "conf_in", "capability": "MCOMEETACPEA"}, Kind.CONF_PPM),
        ({"call_type": "conf_out"}, Kind.CONF_DIAL_OUT),
        ({"call_type": "dr_out"}, Kind.FREE),
        ({"call_type": "dr_emergency_out", "kind": Kind.INTERNATIONAL}, Kind.EMERGENCY),
        ({"call_type": "carrier_pigeon"}, None),
        ({}, None),
    ],
)
def test_the_kind_follows_from_the_call_type(members: dict[str, str], kind: Kind | None) -> None:
    assert coverage.kind_of(a_call(**{"kind": None} | members)) is kind


@pytest.mark.parametrize("number", ["+442079460018", "+11", "+" + "9" * 15])
def test_e164_numbers_are_told(number: str) -> None:
    assert coverage.digits_of(number) == number[1:]


@pytest.mark.parametrize(
    "number",
    [None, "", "+", "+1", "442079460018", "+0442079", "+44 20", "+４４２０７", "+" + "9" * 16],
)
def test_other_caller_texts_are_no_e164(number: str | None) -> None:
    assert coverage.digits_of(number) is None


@pytest.mark.parametrize(
    ("changes", "reason", "path"),
    [
        ({"callee": "1001"}, DeadLetterReason.UNRATED, "$.callee"),
        ({"callee": "+99912345"}, DeadLetterReason.UNRATED, "$.callee"),
        ({"duration_s": None}, DeadLetterReason.SCHEMA_VIOLATION, "$.duration_s"),
        ({"kind": None}, DeadLetterReason.SCHEMA_VIOLATION, "$.kind"),
        ({"currency": "EUR"}, DeadLetterReason.CURRENCY_MISMATCH, "$.currency"),
        ({"phase": Phase.CORRECTION}, DeadLetterReason.REFUSED, "$.corrects"),
        (
            {"started_at": NOW - timedelta(days=41)},
            DeadLetterReason.NOT_BILLABLE,
            "$.started_at",
        ),
    ],
)
def test_what_cannot_be_booked_is_refused_with_its_reason(
    changes: dict[str, object], reason: DeadLetterReason, path: str
) -> None:
    account = an_account("10")
    outcome = apply(account, a_call(**changes))
    assert outcome.refused is not None
    assert (outcome.refused.reason, outcome.refused.path) == (reason, path)
    assert outcome.account is account
    assert outcome.entries == ()


@pytest.mark.parametrize("phase", [Phase.START, Phase.PROGRESS])
def test_an_open_leg_moves_no_money(phase: Phase) -> None:
    assert apply(an_account("10"), a_call(phase=phase)).label == "open"


def test_usage_of_an_unknown_tenant_is_refused() -> None:
    refused = apply(None, a_call()).refused
    assert refused is not None
    assert refused.reason is DeadLetterReason.UNKNOWN_TENANT


def test_usage_that_started_after_closing_is_not_billable_but_before_it_is() -> None:
    closed = apply(an_account("10"), a_command(closing()), NOW - timedelta(seconds=30)).account
    before = apply(closed, a_call(started_at=NOW - timedelta(seconds=60)))
    after = apply(closed, a_call(started_at=NOW - timedelta(seconds=20), duration_s=5))
    assert before.label == "charged"
    assert after.refused is not None
    assert after.refused.reason is DeadLetterReason.NOT_BILLABLE


def test_usage_of_a_former_opening_stays_billable_after_a_re_opening() -> None:
    book = Book(an_account("10"))
    hour = timedelta(hours=1)
    for closed_at in (NOW, NOW + 3 * hour):
        book.feed(a_command(closing()), closed_at)
        # Opened again two hours later, from then on.
        book.feed(a_command(opening(billing_from=None)), closed_at + 2 * hour)
    labels = [
        book.feed(a_call(started_at=NOW + hour * after, duration_s=60), NOW + 9 * hour).label
        for after in (-1, 0, 1, 2, 2.5, 3, 4, 5, 6)
    ]
    assert labels == [
        *("charged", "rejected", "rejected", "charged", "charged"),
        *("rejected", "rejected", "charged", "charged"),
    ]


def test_a_former_opening_is_kept_as_long_as_its_usage_may_come() -> None:
    book = Book(an_account("10"))
    for days in (0, 60, 67):
        book.feed(a_command(closing()), NOW + timedelta(days=days))
        book.feed(a_command(opening(billing_from=None)), NOW + timedelta(days=days))
    assert book.account is not None
    assert [one.until for one in book.account.standing.former] == [
        NOW + timedelta(days=60),
        NOW + timedelta(days=67),
    ]


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (timedelta(days=35), None),
        (timedelta(days=35, seconds=1), DeadLetterReason.TOO_LATE),
        (timedelta(minutes=-5), None),
        (timedelta(minutes=-5, seconds=-1), DeadLetterReason.FROM_THE_FUTURE),
    ],
)
def test_lateness_is_told_by_the_end_of_the_leg(
    age: timedelta, reason: DeadLetterReason | None
) -> None:
    event = a_call(started_at=NOW - age - timedelta(seconds=60))
    assert ledger.Punctuality(NOW).judge(event) is reason


def test_usage_past_the_grace_is_booked_as_late() -> None:
    account = an_account("10")
    on_time = apply(account, a_call(started_at=NOW - timedelta(hours=48, seconds=60)))
    late = apply(account, a_call(started_at=NOW - timedelta(hours=49)))
    assert "late" not in decoded(on_time.entries[0])
    assert decoded(late.entries[0])["late"] is True


def test_the_duration_wins_over_times_that_disagree() -> None:
    started_at = NOW - timedelta(seconds=600)
    event = a_call(started_at=started_at, ended_at=NOW, duration_s=60)
    assert (event.ended_at, event.disagrees) == (started_at + timedelta(seconds=60), True)
    agreeing = a_call(started_at=started_at, ended_at=started_at + timedelta(seconds=61))
    assert not agreeing.disagrees


def test_a_duration_can_follow_from_the_times() -> None:
    usage = CallUsage(
        kind=Kind.INTERNATIONAL,
        call_id="c",
        callee=LONDON,
        started_at=NOW - timedelta(seconds=90),
        ended_at=NOW,
    )
    assert usage_event(usage, a_cause()).duration_s == 90


def test_who_asked_is_no_part_of_what_is_said() -> None:
    same = a_call()
    assert ledger.content(same) == ledger.content(a_call())
    assert ledger.content(same) != ledger.content(a_call(duration_s=61))
    assert ledger.content(same) != ledger.content(a_call(callee="+33123456789"))
