"""Values that are copied by hand: nothing is left behind or changes places."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from schemas import topics
from schemas.codec import decoder
from schemas.usage import Kind, Phase, Usage
from streams.billing.events import UsageEvent
from streams.billing.legs import usage_event
from streams.billing.outcomes import Terms
from streams.billing.parts import Hold
from streams.billing.persons import PersonKeys
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
    "persons": PersonKeys({}),
}
EVENT = {
    "cause": USAGE.cause,
    "kind": Kind.PAYG_OUT,
    "call_type": "user_out",
    "number_type": "mobile",
    "capability": "MCOPSTNPP",
    "phase": Phase.CORRECTION,
    "call_id": "c-1",
    "leg_id": "l-0",
    "organizer_id": "o-1",
    "user_id": "u-1",
    "user_country": "GB",
    "callee": "+442079460018",
    "started_at": USAGE.started_at,
    "ended_at": USAGE.ended_at,
    "duration_s": 11,
    "currency": "GBP",
    "corrects": "e-0",
    "disagrees": True,
    "original": (),
    "leg": "l-1",
    "hold": Hold(nanos=1, elapsed_s=1, until=NOW),
}
SAID = {
    "event_id": "e-1",
    "source": "pbx-1",
    "tenant_id": "t-1",
    "kind": "payg_out",
    "call_type": "user_out",
    "number_type": "mobile",
    "capability": "MCOPSTNPP",
    "phase": "correction",
    "call_id": "c-1",
    "leg_id": "l-1",
    "conference_id": "conf-1",
    "organizer_id": "o-1",
    "user_id": "u-1",
    "user_country": "GB",
    "caller": "+15550100",
    "callee": "+442079460018",
    "started_at": "2026-03-02T10:00:00Z",
    "ended_at": "2026-03-02T10:00:09Z",
    "duration_s": 9,
    "upstream_charge": "0.5",
    "currency": "GBP",
    "corrects": "e-0",
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


@pytest.mark.parametrize("topic", [topics.CALL_USAGE, topics.CONFERENCE_USAGE])
@pytest.mark.parametrize("unknown", [{}, {"new": 1}])
def test_an_event_says_what_its_record_says(topic: str, unknown: dict[str, int]) -> None:
    assert set(SAID) == set(Usage.__struct_fields__), "give the new member a value here"
    record = json.dumps(SAID | unknown).encode()
    usage: Any = decoder(topic).decode(b"t-1", record, ()).event
    event = usage_event(usage, USAGE.cause)
    names = [name for name in parameters_of(UsageEvent) if name in SAID]
    said = msgspec.to_builtins({name: getattr(event, name) for name in names})
    assert said == {name: SAID[name] for name in names}


def test_a_rate_names_all_its_members() -> None:
    assert list(MEMBERS) == parameters_of(Rate)
