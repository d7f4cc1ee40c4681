"""What the auditor calls sound beyond doubt, the product understands."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import topics
from schemas.codec import decoder
from schemas.envelope import RejectedError
from streams.testbed.auditor.events import Event, is_sound, understand
from streams.testbed.auditor.records import Record
from streams.testbed.load import VARIETIES
from tests.auditor.books import AT, usage

KEY = b"contoso"
MONEY = {"amount": "5", "currency": "USD"}
COMMAND = {"command_id": "a1", "source": "cli", "issued_at": AT}
SOUND: list[tuple[str, dict[str, Any]]] = [
    (topics.CALL_USAGE, usage("e1")),
    (topics.CONFERENCE_USAGE, usage("e1", conference_id="f")),
    (topics.RESULT, {
        "result_id": "r1", "source": "pay", "recharge_id": "x", "payment_id": "p1",
        "status": "succeeded", "amount": MONEY, "occurred_at": AT,
    }),
    *((topics.COMMAND, COMMAND | body) for body in (
        {"command": "open_tenant", "currency": "USD", "opening_balance": "100"},
        {"command": "fund", "amount": MONEY},
        {"command": "book_payment", "amount": MONEY, "payment_id": "p"},
        {"command": "adjustment", "amount": MONEY, "reason": "gift"},
        {"command": "grant", "amount": MONEY, "reason": "gift", "every_days": 1, "priority": 9},
        {"command": "void", "grant_id": "g1", "reason": "x"},
        {"command": "licences", "capability": "MCOMEETADV", "count": 3},
        {"command": "resolve_recharge", "recharge_id": "x", "paid": True, "payment_id": "p"},
    )),
]  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just({}), st.just([]),
    st.sampled_from([
        AT, "2026-03-02T10:00:00", "2026-13-02T10:00:00Z", "2026-03-02 10:00:00+01:00", "x" * 256,
        "-1", "01", "1.0000000001", "usd", "EURO", "GB", "paid", 86_400 * 32, 1.0, MONEY,
        {"amount": 5, "currency": "USD"}, "é" * 200, "end", "free", "succeeded", "a b", "USD\n",
    ]),
)  # fmt: skip


def understood(topic: str, value: bytes, headers: Any = ()) -> tuple[bool, bool]:
    """Whether the auditor calls a record sound, and whether the product decodes it."""
    record = Record(topic, 0, 0, 0, KEY, value, tuple(headers))
    event = understand(record, topic)
    sound = isinstance(event, Event) and is_sound(record, event)
    try:
        decoder(topic).decode(KEY, value, headers)
    except RejectedError:
        return sound, False
    return sound, True


@pytest.mark.parametrize(("topic", "body"), SOUND)
def test_what_is_sound_is_called_so(topic: str, body: dict[str, Any]) -> None:
    assert understood(topic, msgspec.json.encode(body)) == (True, True)
    binary = [("ce_specversion", b"1.0"), ("ce_id", b"x"), ("ce_source", b"y"), ("ce_type", b"z")]
    bare = {name: value for name, value in body.items() if name != "source" and name[-3:] != "_id"}
    kept = {name: body[name] for name in body if name in MEMBERS_KEPT}
    assert understood(topic, msgspec.json.encode(bare | kept), binary) == (True, True)
    whole = {"specversion": "1.0", "id": "x", "source": "y", "type": "z", "data": bare | kept}
    structured = [("content-type", b"application/cloudevents+json")]
    assert understood(topic, msgspec.json.encode(whole), structured) == (True, True)


MEMBERS_KEPT = {"call_id", "conference_id", "recharge_id", "payment_id", "grant_id"}


@given(st.sampled_from(SOUND), st.data())
def test_nothing_is_called_sound_that_is_refused_for_its_shape(
    sound: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    topic, body = sound
    names = [*body, "kind", "phase", "amount", "expires_at", "currency", "duration_s", "tenant_id",
             "priority", "conference_id", "reason", "ended_at", "decline_code"]  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2)):
        body = body | {name: data.draw(ODD)}
    for name in data.draw(st.lists(st.sampled_from(names), max_size=1)):
        body = {member: value for member, value in body.items() if member != name}
    headers = []
    if data.draw(st.booleans()):
        texts = st.sampled_from([b"", b"e1", b"pbx", b"contoso", b"\xff", b"x" * 256])
        for name in ("ce_specversion", "ce_id", "ce_source", "ce_subject"):
            if data.draw(st.booleans()):
                headers.append((name, data.draw(texts)))
    called_sound, decoded = understood(topic, msgspec.json.encode(body), headers)
    assert decoded or not called_sound


@pytest.mark.parametrize("variety", VARIETIES, ids=lambda one: one.name)
def test_no_nonsense_is_called_sound(variety: Any) -> None:
    event = usage("e1", started_at=datetime(2026, 3, 2, tzinfo=UTC).isoformat())
    key, value = variety.make(event, KEY)
    if value is None or key != KEY:
        return
    called_sound, decoded = understood(topics.CALL_USAGE, value)
    assert decoded or not called_sound
