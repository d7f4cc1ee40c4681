"""From a source record's bytes to one known event, or to the reason why not."""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Union, final

import msgspec
from mypy_extensions import mypyc_attr

from schemas import topics
from schemas.commands import AnyCommand
from schemas.envelope import Headers, RejectedError, fault_path, open_envelope
from schemas.faults import Faults
from schemas.funding import RechargeResult
from schemas.notices import DeadLetterReason
from schemas.usage import CallUsage, ConferenceUsage, TenantId

Event = CallUsage | ConferenceUsage | AnyCommand | RechargeResult

# What stands for the identity in the data of each kind of event.
_ID_MEMBERS: Final = {
    topics.CALL_USAGE: "event_id",
    topics.CONFERENCE_USAGE: "event_id",
    topics.COMMAND: "command_id",
    topics.RESULT: "result_id",
}
_TYPES: Final = {
    topics.CALL_USAGE: CallUsage,
    topics.CONFERENCE_USAGE: ConferenceUsage,
    topics.COMMAND: AnyCommand,
    topics.RESULT: RechargeResult,
}
_BRACE: Final = 0x7B
_UNKNOWN: Final = "Object contains unknown field"
_SCHEMA_VIOLATION: Final = DeadLetterReason.SCHEMA_VIOLATION


@final
@mypyc_attr(acyclic=True)
class Decoded:
    """An event and its identity. `unknown_fields`: the data had members we do not know."""

    __slots__ = ("event", "id", "source", "tenant_id", "unknown_fields")

    def __init__(
        self, event: Event, source: str, event_id: str, tenant_id: str, unknown_fields: bool
    ) -> None:
        self.event = event
        self.source = source
        self.id = event_id
        self.tenant_id = tenant_id
        self.unknown_fields = unknown_fields


def _forbidding(kind: type) -> type:
    """The same type, refusing unknown members: one decode in the usual case tells both what
    the event is and that nothing in it was ignored. The tenant's pattern is left to the door,
    which compares the name with the key: a pattern costs as much as all other members."""
    return msgspec.defstruct(
        kind.__name__,
        [("tenant_id", str | None, None)],
        bases=(kind,),
        kw_only=True,
        frozen=True,
        gc=False,
        forbid_unknown_fields=True,
        tag_field=kind.__struct_config__.tag_field,  # type: ignore[attr-defined]
        tag=kind.__struct_config__.tag,  # type: ignore[attr-defined]
    )


def _is_tenant(name: str) -> bool:
    try:
        msgspec.convert(name, TenantId)
    except msgspec.ValidationError:
        return False
    return True


class Decoder:
    """Decodes the records of one source topic, by its name in the manifest."""

    def __init__(self, topic: str) -> None:
        declared: Any = _TYPES[topic]
        kinds: tuple[type, ...] = getattr(declared, "__args__", (declared,))
        forbidding: Any = Union[tuple(_forbidding(kind) for kind in kinds)]  # noqa: UP007
        self._topic = topic
        self._member = _ID_MEMBERS[topic]
        self._strict: Callable[[bytes | msgspec.Raw], Event]
        self._strict = msgspec.json.Decoder(forbidding).decode
        self._tolerant: Callable[[bytes | msgspec.Raw], Event]
        self._tolerant = msgspec.json.Decoder(declared).decode
        self._faults = Faults(kinds)

    def decode(
        self, key: bytes | None, value: bytes | None, headers: Headers, known: bool = False
    ) -> Decoded:
        """Decode one record. `known` says that its key is known to be a tenant's name.

        Raises RejectedError with `malformed_json`, `schema_violation` or `key_mismatch`.
        """
        if not value:
            raise RejectedError(DeadLetterReason.MALFORMED_JSON, "$")
        data: Any = value
        outer_id: str | None = None
        outer_source: str | None = None
        outer_subject: str | None = None
        # Bare JSON has no envelope to open.
        if headers or value[0] != _BRACE:
            # Any: to type checkers a `msgspec.Raw` is bytes, to compiled code it is not.
            envelope: Any = open_envelope(value, headers)
            data, outer_id = envelope.data, envelope.id
            outer_source, outer_subject = envelope.source, envelope.subject
        unknown = False
        try:
            try:
                event = self._strict(data)
            except msgspec.ValidationError as error:
                if not str(error).startswith(_UNKNOWN):
                    raise
                unknown = True
                event = self._tolerant(data)
        except msgspec.ValidationError as error:
            path = self._faults.paths(data, fault_path(error))
            raise RejectedError(_SCHEMA_VIOLATION, path) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RejectedError(DeadLetterReason.MALFORMED_JSON, "$") from None

        event_id = getattr(event, self._member)
        if outer_id is not None:
            if event_id is not None and event_id != outer_id:
                raise RejectedError(_SCHEMA_VIOLATION, f"$.{self._member}")
            event_id = outer_id
        if not event_id or len(event_id) > 255:
            raise RejectedError(_SCHEMA_VIOLATION, f"$.{self._member}")

        source = event.source
        if outer_source is not None:
            if source is not None and source != outer_source:
                raise RejectedError(_SCHEMA_VIOLATION, "$.source")
            source = outer_source
        if source is None:
            source = self._topic
        elif not source or len(source) > 255:
            raise RejectedError(_SCHEMA_VIOLATION, "$.source")

        named = event.tenant_id
        tenant_id = named
        if outer_subject is not None:
            if named is not None and named != outer_subject:
                raise RejectedError(_SCHEMA_VIOLATION, "$.tenant_id")
            tenant_id = outer_subject
        if key is None:
            raise RejectedError(DeadLetterReason.KEY_MISMATCH)
        try:
            subject = key.decode()
        except UnicodeDecodeError:
            raise RejectedError(DeadLetterReason.KEY_MISMATCH) from None
        if known and (tenant_id is None or tenant_id == subject):
            return Decoded(event, source, event_id, subject, unknown)
        if named is not None and not _is_tenant(named):
            raise RejectedError(_SCHEMA_VIOLATION, "$.tenant_id")
        if (tenant_id is not None and tenant_id != subject) or not _is_tenant(subject):
            raise RejectedError(DeadLetterReason.KEY_MISMATCH)
        return Decoded(event, source, event_id, subject, unknown)


@cache
def decoder(topic: str) -> Decoder:
    """The decoder of a source topic."""
    return Decoder(topic)
