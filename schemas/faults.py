"""All faults of a record that was refused, for its dead letter. Never on the way of a sound one."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

MOST_FAULTS: Final = 8

_ROOT: Final = "$"


class Faults:
    """Names the faults of data that is none of some types. Schemas are made when first needed."""

    def __init__(self, kinds: Sequence[type]) -> None:
        self._kinds = kinds
        self._validators: dict[type, Any] = {}

    def paths(self, data: bytes | msgspec.Raw, first: str) -> str:
        """JSON paths with a space between, at most eight, the one that was met first in front.

        They name members that we know, never one of the record's own, and never a value. Where
        the rest cannot be told (the bytes are no JSON further on), the first stands alone.
        """
        try:
            found = list(dict.fromkeys(self._all(msgspec.json.decode(data))))
        except (ValueError, RecursionError):
            return first
        # `$` for "something is missing in it" says less than the name of what is missing.
        if not any(one.startswith((f"{first}.", f"{first}[")) for one in found):
            found = [first, *(one for one in found if one != first)]
        return " ".join(found[:MOST_FAULTS])

    def _all(self, body: object) -> Iterator[str]:
        kind = self._kind_of(body)
        if kind is None:
            return
        validator = self._validators.get(kind)
        if validator is None:
            # Not on import: the wire loads nothing that has dice or sockets in it.
            from jsonschema_rs import validator_for

            schema = msgspec.json.schema(kind)
            validator = self._validators[kind] = validator_for(schema, validate_formats=True)
        for error in validator.iter_errors(body):
            yield from _leaves(error)

    def _kind_of(self, body: object) -> type | None:
        if len(self._kinds) == 1:
            return self._kinds[0]
        tag = body.get("command") if isinstance(body, dict) else None
        return next((one for one in self._kinds if one.__struct_config__.tag == tag), None)  # type: ignore[attr-defined]


def _leaves(error: Any) -> Iterator[str]:
    """An optional member fails as "neither this nor null": what is wrong lies in the branches."""
    path = _ROOT + "".join(
        "[...]" if isinstance(step, int) else f".{step}" for step in error.instance_path
    )
    kind = type(error.kind).__name__
    if kind == "Required":
        yield f"{path}.{error.kind.property}"
    elif kind == "AnyOf":
        inner = [leaf for branch in error.kind.context for one in branch for leaf in _leaves(one)]
        yield from [leaf for leaf in inner if leaf != path] or [path]
    else:
        yield path
