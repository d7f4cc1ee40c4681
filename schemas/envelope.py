"""CloudEvents 1.0 on Kafka: taken in binary, structured and bare form, written in binary form.

Bare JSON is for producers that know nothing of CloudEvents: then the identity stands in the data
and the rest follows from the topic. Confluent's five-byte JSON frame is taken off.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from schemas.notices import DeadLetterReason

Headers = Sequence[tuple[str, bytes]]

STRUCTURED: Final = b"application/cloudevents+json"
CAUSED_BY: Final = "credits-caused-by"
MOVED_FROM: Final = "credits-moved-from"
# W3C trace context travels on, untouched.
TRACE_HEADERS: Final = frozenset({"traceparent", "tracestate"})

_FRAME_BYTES: Final = 5
_BRACE: Final = 0x7B


class RejectedError(Exception):
    """The record is no event we know; it goes to the dead letters as it came.

    `reason` is the closed vocabulary's word, `path` the JSON paths of the faults, the first one
    in front ("" when the fault is not in the JSON). Neither ever holds a value from the record.
    """

    def __init__(self, reason: DeadLetterReason, path: str = "") -> None:
        super().__init__(reason.value, path)
        self.reason = reason
        self.path = path


class Envelope(Struct, frozen=True, gc=False):
    """What stands around an event's data; None where the form does not say."""

    data: bytes | msgspec.Raw
    id: str | None = None
    source: str | None = None
    subject: str | None = None


class _Structured(Struct, frozen=True, kw_only=True):
    specversion: str
    id: str
    source: str
    type: str
    subject: str | None = None
    data: msgspec.Raw


_structured = msgspec.json.Decoder(_Structured)


def fault_path(error: Exception) -> str:
    """The JSON path in an error of msgspec, such as `$.started_at`; `$` when it names none."""
    _, _, path = str(error).rpartition(" - at `")
    return path.rstrip("`") if path.startswith("$") else "$"


def open_envelope(value: bytes, headers: Headers) -> Envelope:
    """Take the envelope off a record.

    Raises RejectedError (`malformed_json`, `schema_violation`) when a structured envelope is
    broken; whether the data is sound is for the decoder of the data to say.
    """
    if len(value) > _FRAME_BYTES and value[0] == 0 and value[_FRAME_BYTES] == _BRACE:
        value = value[_FRAME_BYTES:]
    if not headers:
        return Envelope(value)
    try:
        known = {name.lower(): content for name, content in headers if content is not None}
        if known.get("content-type", b"").lower().startswith(STRUCTURED):
            event = _structured.decode(value)
            return Envelope(event.data, event.id, event.source, event.subject)
        if "ce_specversion" not in known:
            return Envelope(value)
        subject = known.get("ce_subject")
        return Envelope(
            value,
            known["ce_id"].decode(),
            known["ce_source"].decode(),
            None if subject is None else subject.decode(),
        )
    except msgspec.ValidationError as error:
        raise RejectedError(DeadLetterReason.SCHEMA_VIOLATION, fault_path(error)) from None
    except (msgspec.DecodeError, RecursionError):
        raise RejectedError(DeadLetterReason.MALFORMED_JSON, "$") from None
    except KeyError as missing:
        raise RejectedError(DeadLetterReason.SCHEMA_VIOLATION, str(missing.args[0])) from None
    except UnicodeDecodeError:
        raise RejectedError(DeadLetterReason.SCHEMA_VIOLATION, "ce_id") from None


def common_headers(event_type: str, *, source: str) -> list[tuple[str, bytes]]:
    """What the headers of all records of one type and source in binary form begin with."""
    return [
        ("ce_specversion", b"1.0"),
        ("content-type", b"application/json"),
        ("ce_type", event_type.encode()),
        ("ce_source", source.encode()),
    ]


def binary_headers(
    event_type: str, *, source: str, event_id: str, caused_by: str | None = None
) -> list[tuple[str, bytes]]:
    """The headers of a record in binary form; the key says the subject."""
    headers = [*common_headers(event_type, source=source), ("ce_id", event_id.encode())]
    if caused_by is not None:
        headers.append((CAUSED_BY, caused_by.encode()))
    return headers
