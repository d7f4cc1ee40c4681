"""Which version of which deck prices a call: the tenant's deck, the start of the call."""

from datetime import datetime, timedelta

import msgspec
import pytest

from schemas.commands import TariffAssignment
from schemas.nanos import NANOS, text_from
from streams.billing.account import Account, decode_row, encode_row
from streams.billing.outcomes import Outcome
from streams.billing.parts import AccountRow, Watch
from streams.billing.rates import Decks, Rate, Tariff
from tests.billing.builders import (
    NOW,
    a_call,
    a_command,
    an_account,
    apply,
    decoded,
    some_terms,
    told,
)

HOUR = timedelta(hours=1)


def a_version(name: str, dollars: int, since: datetime, deck: str = "default") -> Tariff:
    rates = {"4420": Rate(prefix="4420", per_minute=dollars * NANOS, per_minute_text=str(dollars))}
    return Tariff(deck, name, rates, effective_from=since)


def decks(*published: Tariff) -> Decks:
    return Decks(
        some_terms().tariff,
        [(one.deck, one.effective_from, one) for one in published if one.effective_from],
    )


def priced(outcome: Outcome) -> tuple[str, str, str]:
    entry = decoded(outcome.entries[0])
    return entry["rate"]["deck"], entry["rate"]["version"], entry["amount"]


def assigned(account: Account, deck: str, since: datetime | None = None) -> Account:
    command = TariffAssignment(tenant_id="t-1", issued_at=NOW, deck=deck, effective_from=since)
    outcome = apply(account, a_command(command))
    assert told(outcome) == ["command_applied", "deck_changed"]
    notice = outcome.notices[1]
    assert (notice.deck, notice.effective_from) == (deck, since or NOW)
    assert outcome.account is not None
    return outcome.account


def a_minute(ago: timedelta) -> Outcome:
    found = decks(
        a_version("two", 2, NOW - 3 * HOUR),
        a_version("three", 3, NOW - HOUR),
        a_version("three-again", 4, NOW - HOUR),
        a_version("earlier", 5, NOW - 2 * HOUR),
    )
    return apply(an_account("100"), a_call(started_at=NOW - ago), decks=found)


@pytest.mark.parametrize(
    ("ago", "version"),
    [
        (4 * HOUR, "file-test"),
        (3 * HOUR, "two"),
        (2 * HOUR + timedelta(seconds=1), "two"),
        (2 * HOUR, "earlier"),
        (HOUR + timedelta(seconds=1), "earlier"),
        (HOUR, "three-again"),
    ],
)
def test_the_version_in_force_when_the_call_started_prices_it(ago: timedelta, version: str) -> None:
    assert priced(a_minute(ago))[:2] == ("default", version)


def test_a_tenants_deck_counts_for_calls_that_start_after_its_assignment() -> None:
    found = decks(a_version("theirs", 7, NOW - 9 * HOUR, "partners"))
    account = assigned(an_account("100"), "partners", NOW - 2 * HOUR)
    account = assigned(account, "default", NOW - HOUR)
    for ago, deck in ((3, "default"), (2, "partners"), (1, "default")):
        call = a_call(started_at=NOW - ago * HOUR)
        assert priced(apply(account, call, decks=found))[0] == deck
    again = assigned(account, "default", NOW - 2 * HOUR)
    call = a_call(started_at=NOW - 2 * HOUR)
    assert priced(apply(again, call, decks=found))[0] == "default"


@pytest.mark.parametrize("published", [None, decks(a_version("late", 7, NOW + HOUR, "partners"))])
def test_a_call_by_a_deck_that_is_not_there_yet_is_unrated(published: Decks | None) -> None:
    account = assigned(an_account("100"), "partners", NOW - HOUR)
    outcome = apply(account, a_call(), decks=published)
    assert outcome.account is account
    refused = outcome.refused
    assert refused is not None
    assert refused.exposure_nanos is not None
    assert (refused.reason, refused.path) == ("unrated", "$.tenant_id")
    assert text_from(refused.exposure_nanos) == "1"
    before = a_call(started_at=NOW - 2 * HOUR)
    assert priced(apply(account, before, decks=published))[0] == "default"


def test_a_deck_of_old_calls_that_was_let_go_leaves_them_unrated() -> None:
    found = Decks(some_terms().tariff, [("default", NOW - 3 * HOUR, None)])
    outcome = apply(an_account("9"), a_call(), decks=found)
    assert outcome.refused is not None
    assert outcome.refused.reason == "unrated"


def test_assignments_are_kept_in_the_row_for_as_long_as_calls_may_come() -> None:
    account = an_account("100")
    for days in (35, 34, 33):
        account = assigned(account, f"d{days}", NOW - timedelta(days=days))
    assert decode_row(encode_row(account)).standing.decks == account.standing.decks
    command = TariffAssignment(tenant_id="t-1", issued_at=NOW, deck="late")
    later = apply(account, a_command(command), NOW + timedelta(days=33)).account
    assert later is not None
    assert [one.deck for one in later.standing.decks] == ["d34", "d33", "late"]


def test_a_row_of_before_there_were_decks_is_read() -> None:
    account = an_account("100")
    row = encode_row(account)
    members = msgspec.msgpack.decode(row[8:])
    place = AccountRow.__struct_fields__.index("decks")
    older = row[:8] + msgspec.msgpack.encode(members[:place])
    assert decode_row(older) == account.changed(watch=Watch())


@pytest.mark.parametrize(
    ("since", "rule"),
    [
        (NOW - timedelta(days=36), "effective_from"),
        (NOW + timedelta(days=12), "too_many_assignments"),
    ],
)
def test_an_assignment_that_makes_no_sense_is_refused(since: datetime, rule: str) -> None:
    account = an_account("100")
    for days in range(12):
        account = assigned(account, "partners", NOW + timedelta(days=days))
    command = TariffAssignment(tenant_id="t-1", issued_at=NOW, deck="x", effective_from=since)
    outcome = apply(account, a_command(command))
    assert [(one.notice.value, one.rule) for one in outcome.notices] == [("command_refused", rule)]
    assert outcome.account is not None
    assert outcome.account.standing.decks == account.standing.decks
