"""Copies of values that are written by hand: nothing is left behind."""

from collections.abc import Callable
from typing import Any

import pytest

from streams.billing.account import Hold
from streams.billing.events import UsageEvent
from streams.billing.outcomes import Terms
from streams.billing.rates import MEMBERS, Decks, Rate, Rounding, Special, Tariff
from tests.billing.builders import NOW, minutes, parameters_of

USAGE = minutes(1)
TARIFF = Tariff("d", "1", {})
TERMS = {
    "tariff": TARIFF,
    "stale": False,
    "result_timeout_s": 7,
    "decks": Decks(TARIFF, []),
    "coverage": Terms(TARIFF).coverage,
}
EVENT = {
    "usage": USAGE.usage,
    "cause": USAGE.cause,
    "started_at": USAGE.started_at,
    "ended_at": USAGE.ended_at,
    "duration_s": 11,
    "disagrees": True,
    "original": (),
    "leg": "l-1",
    "hold": Hold(nanos=1, elapsed_s=1, until=NOW),
}
RATE = {
    "prefix": "44",
    "per_minute": 5,
    "connect_fee": 6,
    "scale": 4,
    "initial_increment_s": 30,
    "increment_s": 6,
    "rounding": Rounding("up", 2),
    "country": "GB",
    "type": "mobile",
    "per_minute_text": "0.0005",
    "connect_fee_text": "0.0006",
    "risk_class": "premium",
    "special": None,
}


@pytest.mark.parametrize(
    ("kind", "members", "copy", "changes"),
    [
        (UsageEvent, EVENT, lambda one: one.about("l-2", None), {"leg": "l-2", "hold": None}),
        (UsageEvent, EVENT, lambda one: one.correcting(None), {"original": None}),
        (Terms, TERMS, lambda one: one.while_behind(), {"stale": True}),
        (Terms, TERMS | {"stale": True}, lambda one: one.with_decks(None), {"decks": None}),
        (Rate, RATE, lambda one: one.with_special(Special()), {"special": Special()}),
    ],
)
def test_a_copy_changes_what_it_says_and_nothing_else(
    kind: Callable[..., Any],
    members: dict[str, Any],
    copy: Callable[[Any], Any],
    changes: dict[str, Any],
) -> None:
    assert isinstance(kind, type)
    assert set(members) == set(parameters_of(kind)), "give the new member a value here"
    twin = copy(kind(**members))
    assert {name: getattr(twin, name) for name in members} == members | changes


def test_a_rate_names_all_its_members() -> None:
    assert list(MEMBERS) == parameters_of(Rate)
