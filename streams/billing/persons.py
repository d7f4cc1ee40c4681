"""Persons in the books: pseudonyms under a key of their tenant's, and none without a key.

The keys never enter Kafka. Who deletes a tenant's key leaves pseudonyms that nobody can lead back
to a person.
"""

import hmac
from collections.abc import Mapping
from hashlib import sha256
from typing import Final

import msgspec

from streams.billing.events import UsageEvent

_KEY_BYTES: Final = 32
# 128 bits: no two persons of a tenant are alike, and an entry stays short.
_SHOWN: Final = 32


class PersonKeysError(Exception):
    """A file of keys cannot be used. The text says why, and shows no key."""


class PersonKeys:
    """A key for each tenant whose entries are to say whose calls they were."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    def members(self, tenant_id: str, event: UsageEvent) -> dict[str, str]:
        """The members `user` and `organizer` of the entry of an event: HMAC-SHA256 under the
        tenant's key, the first 32 hexadecimal digits. Empty without a key."""
        key = self._keys.get(tenant_id)
        if key is None:
            return {}
        named = {"user": event.user_id, "organizer": event.organizer_id}
        return {
            member: hmac.new(key, person.encode(), sha256).hexdigest()[:_SHOWN]
            for member, person in named.items()
            if person is not None
        }


def parse_person_keys(content: bytes) -> PersonKeys:
    """Read a JSON object of tenants and their keys, 64 hexadecimal digits each. Raises
    PersonKeysError."""
    try:
        said = msgspec.json.decode(content, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise PersonKeysError("it is no JSON object of tenants and their keys") from None
    keys: dict[str, bytes] = {}
    for tenant_id, text in said.items():
        try:
            keys[tenant_id] = bytes.fromhex(text)
        except ValueError:
            keys[tenant_id] = b""
        if len(keys[tenant_id]) != _KEY_BYTES:
            raise PersonKeysError(
                f"the key of {tenant_id!r} is not 64 hexadecimal digits; `openssl rand -hex 32` "
                "makes one"
            )
    return PersonKeys(keys)
