"""The administrators' orders of a campaign, without a broker: the core answers as they foresee."""

from collections import Counter
from datetime import timedelta
from itertools import islice
from typing import Any

import msgspec
import pytest

from schemas import topics
from schemas.codec import decoder
from schemas.commands import BookPayment, ResolveRecharge
from schemas.envelope import RejectedError
from schemas.notices import DeadLetterReason
from streams.billing import ledger
from streams.billing.account import Account
from streams.billing.events import Cause, CommandEvent
from streams.billing.parts import Payment
from streams.billing.tariff import parse_deck
from streams.coverage import load_coverage
from streams.testbed import load
from streams.testbed.load import Planned
from tests.billing.builders import NOW, some_terms
from tests.chaos.orders import CONFLICT, FAR, MOBILE, NOWHERE, Answers, Office
from tests.chaos.stage import repriced

PLAN = load.Plan(tenants=40, seed=5, licensed_ppm=300_000, granted_ppm=200_000)
MANY = 1_500
TERMS = some_terms(coverage=load_coverage(None))


def office(seed: int = 5) -> Office:
    return Office(msgspec.structs.replace(PLAN, seed=seed), NOW)


class Ledger:
    """The core with a memory for ids, and without a broker."""

    def __init__(self, *, forgetful: bool = False) -> None:
        self.forgetful = forgetful
        self.accounts: dict[str, Account] = {}
        self._payments: dict[tuple[str, str], Payment] = {}
        self._seen: dict[str, bytes] = {}
        self.letters: list[tuple[str, DeadLetterReason]] = []
        self.notices: list[dict[str, Any]] = []

    def take(self, record: Planned, number: int) -> None:
        """Answer a record, or bury it."""
        if record.misplaced:
            self.letters.append((record.event_id, DeadLetterReason.WRONG_PARTITION))
            return
        try:
            found = decoder(topics.COMMAND).decode(record.key, record.value, list(record.headers))
        except RejectedError as error:
            self.letters.append((record.event_id, error.reason))
            return
        command: Any = msgspec.structs.replace(found.event, tenant_id=found.tenant_id)
        cause = Cause(topics.COMMAND, 0, number, found.source, found.id)
        payment = None
        if isinstance(command, BookPayment | ResolveRecharge) and command.payment_id is not None:
            payment = self._payments.get((found.tenant_id, command.payment_id))
        event = CommandEvent(command, cause, payment)
        said = ledger.content(event)
        first = self._seen.get(found.id)
        if first is not None and not self.forgetful:
            conflict = first != said
            if conflict:
                self.letters.append((found.id, DeadLetterReason.CONFLICT))
            kind = "command_refused" if conflict else "command_repeated"
            self.notices.append({"notice": kind, "command_id": found.id, "rule": CONFLICT})
            return
        self._seen[found.id] = said
        now = NOW + timedelta(seconds=number)
        outcome = ledger.apply(self.accounts.get(found.tenant_id), event, TERMS, now)
        if outcome.account is not None:
            self.accounts[found.tenant_id] = outcome.account
        if outcome.payment is not None:
            self._payments[found.tenant_id, outcome.payment.payment_id] = outcome.payment
        self.notices += [msgspec.to_builtins(one) for one in outcome.notices]


def played(orders: Office, *, forgetful: bool = False) -> tuple[Ledger, list[str]]:
    """What the ledger made of many orders, and what the campaign says of its answers."""
    books = Ledger(forgetful=forgetful)
    for number, record in enumerate(load.openings(orders.plan, NOW)):
        books.take(record, number)
    written: Counter[str] = Counter()
    for number, record in enumerate(islice(orders.following(), MANY), MANY):
        books.take(record, number)
        written[record.event_id] += 1
    answers = Answers()
    for notice in books.notices:
        answers.take(notice, orders.orders)
    return books, list(answers.faults(written, orders.orders))


@pytest.mark.parametrize("seed", [5, 6])
def test_every_order_is_answered_as_it_foresees(seed: int) -> None:
    orders = office(seed)
    books, faults = played(orders)
    assert "\n".join(faults) == ""
    foreseen = Counter(
        record.reason
        for record in islice(office(seed).following(), MANY)
        if record.reason is not None
    )
    assert Counter(reason for _, reason in books.letters) == foreseen


def test_limits_of_risk_classes_are_drawn_and_come_into_force() -> None:
    books, _ = played(office())
    limited = [
        dict(account.standing.policy.velocity)
        for account in books.accounts.values()
        if account.standing.policy.velocity
    ]
    assert {one for limits in limited for one in limits} == {MOBILE, FAR, NOWHERE}


def test_the_decks_of_a_campaign_have_risk_classes() -> None:
    rates = parse_deck(repriced(80), deck="default", version="v").rates
    classes = [rates[prefix].risk_class for prefix in ("447", "263", "4420")]
    assert classes == [MOBILE, FAR, ""]


def test_the_same_seed_gives_the_same_orders() -> None:
    first, second = (list(islice(office().following(), 500)) for _ in range(2))
    assert first == second
    assert first != list(islice(office(6).following(), 500))


def test_an_order_that_is_decided_twice_is_noticed() -> None:
    _, faults = played(office(), forgetful=True)
    assert any("decided again" in fault for fault in faults)
