"""Versions of rate decks, put together from the records of their topic."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
import pytest

from schemas.decks import (
    CHUNK_BYTES,
    Assembly,
    DeckManifest,
    Version,
    chunk_key,
    manifest_key,
    packed,
)

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
TEXT = b"".join(sha256(b"%d" % number).hexdigest().encode() for number in range(40_000))


def records(text: bytes = TEXT, **changes: Any) -> list[tuple[bytes, bytes]]:
    chunks = packed(text)
    members: dict[str, Any] = {
        "deck": "default", "version": "v1", "effective_from": NOW, "published_at": NOW, "rows": 1,
        "chunks": len(chunks), "size": len(text), "sha256": sha256(text).hexdigest(),
    } | changes  # fmt: skip
    manifest = DeckManifest(**members)
    found = [(chunk_key("default", "v1", at), chunk) for at, chunk in enumerate(chunks)]
    return [*found, (manifest_key("default", "v1"), msgspec.json.encode(manifest))]


def read(*given: tuple[bytes, bytes | None]) -> list[Any]:
    assembly = Assembly()
    return [assembly.add(key, value) for key, value in given]


def test_chunks_and_their_manifest_are_a_version() -> None:
    made = records()
    assert len(made) > 2
    assert all(len(chunk) <= CHUNK_BYTES for _, chunk in made[:-1])
    *nothing, version = read(*made)
    assert set(nothing) == {None}
    assert isinstance(version, Version)
    assert (version.text, version.manifest.version) == (TEXT, "v1")


def test_a_version_without_its_manifest_is_not_there() -> None:
    assert set(read(*records()[:-1])) == {None}


def test_a_chunk_that_was_written_twice_is_one() -> None:
    made = records()
    assert isinstance(read(made[0], *made)[-1], Version)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (records()[1:], "default/v1 cannot be read: KeyError"),
        (records(sha256="0" * 64), "default/v1 is not what its manifest says"),
        (records(size=10), "default/v1 is not what its manifest says"),
        (records(version="v2"), "default/v1 calls itself default/v2"),
        ([*records()[:-1], (manifest_key("default", "v1"), b"{")], "default/v1 cannot be read"),
        ([(b"default/v1/0", b"x"), *records()[1:]], "default/v1 cannot be read: error"),
        ([(b"nonsense", b"x")], "'nonsense' is no key of a deck's record"),
    ],
)
def test_a_version_that_is_not_whole_is_ignored_and_says_why(
    made: list[tuple[bytes, bytes | None]], why: str
) -> None:
    assert str(read(*made)[-1]).startswith(why)


def test_a_version_that_was_taken_back_is_nothing() -> None:
    assert set(read(*records()[:-1], (manifest_key("default", "v1"), None))) == {None}
