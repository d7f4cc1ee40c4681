"""The wire: its schemas, its envelopes, and every way to get a record wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from cloudevents.core.bindings.kafka import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from schemas import generate, topics
from schemas.codec import Decoded, decoder
from schemas.envelope import RejectedError, binary_headers
from schemas.notices import DeadLetterReason
from schemas.topics import MANIFEST, MAX_RECORD_BYTES, SOURCES, Names, dead_letters_of
from schemas.usage import CallUsage

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
USAGE = dict(generate.WIRE[0][3])


def decode(value: bytes | None, key: bytes | None = b"contoso", headers: Any = ()) -> Decoded:
    return decoder(topics.CALL_USAGE).decode(key, value, headers)


def test_committed_schemas_are_what_the_types_say() -> None:
    assert generate.stale() == []


def test_schemas_are_valid_json_schema() -> None:
    files = sorted(str(path) for path in generate.FOLDER.glob("*.json"))
    program = str(Path(sys.executable).parent / "check-jsonschema")
    done = subprocess.run([program, "--check-metaschema", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [f"{one[0]}.json" for one in generate.WIRE])
def test_examples_keep_to_their_schema(name: str) -> None:
    schema = json.loads((generate.FOLDER / name).read_text())
    for example in schema["examples"]:
        jsonschema_rs.validate(schema, example)


def test_a_broken_example_would_be_noticed() -> None:
    schema = json.loads((generate.FOLDER / "telephony.call.usage.v1.json").read_text())
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema, {**USAGE, "duration_s": -1})


@pytest.mark.parametrize(("name", "kind"), [(one[0], one[1]) for one in generate.WIRE])
def test_golden_records_of_this_version_decode_for_ever(name: str, kind: Any) -> None:
    for line in (GOLDEN / f"{name}.jsonl").read_bytes().splitlines():
        msgspec.json.decode(line, type=kind)


# -- envelopes ------------------------------------------------------------------------------------


def cloud_event() -> CloudEvent:
    data = {name: value for name, value in USAGE.items() if name not in ("event_id", "source")}
    attributes = {
        "id": "5b0c1f7e",
        "source": "pbx-1",
        "type": topics.CALL_USAGE,
        "specversion": "1.0",
        "subject": "contoso",
        "datacontenttype": "application/json",
    }
    return CloudEvent(attributes=attributes, data=data)


@pytest.mark.parametrize("bind", [to_binary, to_structured])
def test_what_another_library_wraps_is_understood(bind: Callable[..., Any]) -> None:
    message = bind(cloud_event(), JSONFormat(), lambda _: b"contoso")
    value = message.value if isinstance(message.value, bytes) else message.value.encode()
    found = decode(value, b"contoso", tuple(message.headers.items()))
    assert (found.source, found.id, found.tenant_id) == ("pbx-1", "5b0c1f7e", "contoso")


def test_bare_json_carries_its_identity_itself() -> None:
    found = decode(json.dumps(USAGE).encode())
    assert (found.source, found.id) == ("pbx-1", "5b0c1f7e")


def test_bare_json_without_source_and_tenant_takes_topic_and_key() -> None:
    bare = {name: value for name, value in USAGE.items() if name not in ("source", "tenant_id")}
    found = decode(json.dumps(bare).encode())
    assert (found.source, found.tenant_id) == (topics.CALL_USAGE, "contoso")


def test_a_frame_of_confluents_serializer_is_taken_off() -> None:
    assert decode(b"\0\0\0\0\7" + json.dumps(USAGE).encode()).id == "5b0c1f7e"


def test_unknown_members_are_accepted_and_told() -> None:
    assert decode(json.dumps({**USAGE, "new": 1}).encode()).unknown_fields
    assert not decode(json.dumps(USAGE).encode()).unknown_fields


@pytest.mark.parametrize(
    ("changes", "path"),
    [({"event_id": "other"}, "$.event_id"), ({"source": "other"}, "$.source")],
)
def test_envelope_and_data_must_agree(changes: dict[str, str], path: str) -> None:
    headers = binary_headers(topics.CALL_USAGE, source="pbx-1", event_id="5b0c1f7e")
    with pytest.raises(RejectedError) as caught:
        decode(json.dumps({**USAGE, **changes}).encode(), b"contoso", headers)
    assert (caught.value.reason, caught.value.path) == (DeadLetterReason.SCHEMA_VIOLATION, path)


def test_a_structured_envelope_without_its_id_is_refused() -> None:
    value = json.dumps({"specversion": "1.0", "source": "s", "type": "t", "data": USAGE}).encode()
    headers = (("content-type", b"application/cloudevents+json; charset=utf-8"),)
    with pytest.raises(RejectedError) as caught:
        decode(value, b"contoso", headers)
    assert caught.value.reason is DeadLetterReason.SCHEMA_VIOLATION


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"started_at": "2026-03-02T10:00:00"}, "$.started_at"),
        ({"duration_s": -1}, "$.duration_s"),
        ({"duration_s": 1.5}, "$.duration_s"),
        ({"duration_s": 10**30}, "$.duration_s"),
        ({"upstream_charge": 0.1}, "$.upstream_charge"),
        ({"upstream_charge": "0.0123456789"}, "$.upstream_charge"),
        ({"upstream_charge": "1\n"}, "$.upstream_charge"),
        ({"currency": "usd"}, "$.currency"),
        ({"tenant_id": "con toso"}, "$.tenant_id"),
        ({"kind": "fax"}, "$.kind"),
        ({"event_id": ""}, "$.event_id"),
        ({"call_id": None}, "$.call_id"),
    ],
)
def test_a_wrong_member_is_named_by_its_path(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(RejectedError) as caught:
        decode(json.dumps({**USAGE, **changes}).encode())
    assert (caught.value.reason, caught.value.path) == (DeadLetterReason.SCHEMA_VIOLATION, path)


@pytest.mark.parametrize("value", [None, b"", b"{", b"\xff", b'{"a":' * 1_100, b'{"a":NaN}'])
def test_what_is_no_json_is_malformed(value: bytes | None) -> None:
    with pytest.raises(RejectedError) as caught:
        decode(value)
    assert caught.value.reason is DeadLetterReason.MALFORMED_JSON


@pytest.mark.parametrize("key", [None, b"fabrikam", b"\xff", b"con toso"])
def test_the_key_is_the_tenant(key: bytes | None) -> None:
    with pytest.raises(RejectedError) as caught:
        decode(json.dumps(USAGE).encode(), key)
    assert caught.value.reason is DeadLetterReason.KEY_MISMATCH


def test_a_refusal_never_quotes_the_record() -> None:
    with pytest.raises(RejectedError) as caught:
        decode(json.dumps({**USAGE, "callee": 442079460018}).encode())
    assert "442079460018" not in str(caught.value)


# -- topics ---------------------------------------------------------------------------------------


def test_a_namespace_prefixes_every_default_name_and_no_set_one() -> None:
    names = Names(namespace="demo-", call_usage="calls")
    assert names.of(topics.LEDGER) == "demo-credits.ledger.entry.v1"
    assert names.of(topics.CALL_USAGE) == "calls"
    assert names.of(dead_letters_of(topics.CALL_USAGE)) == "calls.credits.dlq"


def test_dead_letters_have_room_for_the_largest_record_and_their_headers() -> None:
    sizes = {topic.name: int(topic.config["max.message.bytes"]) for topic in MANIFEST}
    for source in SOURCES:
        assert sizes[dead_letters_of(source)] == sizes[source] + 65_536 == MAX_RECORD_BYTES + 65_536


def test_every_topic_stands_once() -> None:
    names = [topic.name for topic in MANIFEST]
    assert len(set(names)) == len(names) == 15


# -- all faults of a refused record ---------------------------------------------------------------


def faults(topic: str, body: object) -> list[str]:
    value = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RejectedError) as caught:
        decoder(topic).decode(b"t-1", value, ())
    return caught.value.path.split(" ")


def test_a_refused_record_names_all_its_faults() -> None:
    body = {
        "event_id": "e",
        "call_id": 7,
        "started_at": "2026-03-02T10:00:00",
        "duration_s": -1,
        "kind": "smoke_signal",
        "callee": "+442079460018",
    }
    assert sorted(faults(topics.CALL_USAGE, body)) == [
        "$.call_id",
        "$.duration_s",
        "$.kind",
        "$.started_at",
    ]


def test_what_is_missing_is_named_and_so_is_what_lies_deep() -> None:
    assert sorted(faults(topics.CALL_USAGE, {"event_id": "e"})) == ["$.call_id", "$.started_at"]
    command = {
        "command": "settings",
        "issued_at": "2026-03-02T10:00:00Z",
        "policy": {"trigger": 1, "method": "guess"},
        "payment_methods": [1, 2],
    }
    assert sorted(faults(topics.COMMAND, command)) == [
        "$.expected_version",
        "$.payment_methods[...]",
        "$.policy.method",
        "$.policy.trigger",
    ]
    answer = {"result_id": "r", "recharge_id": "r", "status": "?", "amount": {"amount": "1e5"}}
    assert sorted(faults(topics.RESULT, answer)) == [
        "$.amount.amount",
        "$.amount.currency",
        "$.occurred_at",
        "$.payment_id",
        "$.status",
    ]


def test_the_fault_that_was_met_first_stands_first_and_no_more_than_eight_are_named() -> None:
    body = {"event_id": "e", "leg_id": 1} | dict.fromkeys(
        ("call_id", "kind", "phase", "callee", "caller", "currency", "corrects", "user_id"), 7
    )
    found = faults(topics.CALL_USAGE, body)
    assert len(found) == 8
    assert found[0] == "$.leg_id"


@pytest.mark.parametrize(
    ("topic", "value", "first"),
    [
        (topics.COMMAND, b'{"command":"dance"}', "$.command"),
        (topics.COMMAND, b'{"issued_at":7}', "$"),
        (topics.CALL_USAGE, b"[]", "$"),
        (topics.CALL_USAGE, b'{"call_id":7,', "$.call_id"),
        (topics.CALL_USAGE, b'{"call_id":7,"duration_s":1' + b"0" * 400 + b"}", "$.call_id"),
        (topics.CALL_USAGE, b'{"call_id":7,"x":"\\ud800"}', "$.call_id"),
        (topics.CALL_USAGE, b'{"call_id":7,"x":' + b"[" * 400 + b"]" * 400 + b"}", "$.call_id"),
    ],
)
def test_a_record_whose_faults_cannot_be_listed_still_names_the_first(
    topic: str, value: bytes, first: str
) -> None:
    assert faults(topic, value)[0] == first


@given(st.binary(max_size=200) | st.from_regex(r'\{"call_id": ?[\[\{0-9a-z":,]{0,60}\}?'))
def test_whatever_a_record_holds_the_paths_hold_no_value_of_it(value: bytes | str) -> None:
    raw = value.encode() if isinstance(value, str) else value
    try:
        decoder(topics.CALL_USAGE).decode(b"t-1", raw, ())
    except RejectedError as error:
        named = {field.encode_name for field in msgspec.structs.fields(CallUsage)}
        for path in filter(None, error.path.split(" ")):
            assert set(path.lstrip("$").replace("[...]", "").split(".")[1:]) <= named
