"""Rate decks on their topic: `credits.tariff.v1`, one partition, compacted.

A version is its deck's CSV text, compressed (zlib) and cut into chunks, each a record of its own
under `deck/version/number`, and a closing manifest (JSON) under `deck/version/manifest`. A version
without its manifest, or whose chunks do not come to the manifest's SHA-256, is not there.
"""

import zlib
from hashlib import sha256
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from schemas.usage import Text, Timestamp

CHUNK_BYTES: Final = 512 * 1024
# Ten million rows; what claims to be larger is no deck.
MAX_DECK_BYTES: Final = 512 << 20
_MANIFEST: Final = "manifest"

DeckName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)", examples=["default"])]


class DeckManifest(Struct, kw_only=True, frozen=True, gc=False):
    """What closes a version. It is in force for calls that start at `effective_from` or later,
    until a version with a later one is; among equals the one published last. `retroactive` says
    that somebody wanted it to begin less than ten minutes after its publication; what is booked
    keeps its price. `sha256` is that of the CSV text, `size` its bytes."""

    deck: DeckName
    version: DeckName
    effective_from: Timestamp
    published_at: Timestamp
    published_by: Text | None = None
    retroactive: bool = False
    rows: Annotated[int, Meta(ge=1)]
    chunks: Annotated[int, Meta(ge=1, le=10_000)]
    size: Annotated[int, Meta(ge=1, le=MAX_DECK_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]


def packed(text: bytes) -> list[bytes]:
    """A deck's text as chunks."""
    whole = zlib.compress(text, 9)
    return [whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES)]


def chunk_key(deck: str, version: str, number: int) -> bytes:
    """The key of a chunk's record."""
    return f"{deck}/{version}/{number}".encode()


def manifest_key(deck: str, version: str) -> bytes:
    """The key of a manifest's record."""
    return f"{deck}/{version}/{_MANIFEST}".encode()


class Version(Struct, frozen=True, gc=False):
    """A complete version as it was read: its manifest and the chunks, still compressed."""

    manifest: DeckManifest
    whole: bytes

    @property
    def name(self) -> tuple[str, str]:
        """Deck and version."""
        return self.manifest.deck, self.manifest.version

    @property
    def text(self) -> bytes:
        """The deck's CSV."""
        return _inflated(self.whole, self.manifest.size)


def _inflated(whole: bytes, size: int) -> bytes:
    """No more than one byte beyond what the manifest says. Raises zlib.error."""
    return zlib.decompressobj().decompress(whole, size + 1)


class Assembly:
    """Puts versions together from the topic's records, in their order."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, str], dict[str, bytes]] = {}

    def add(self, key: bytes | None, value: bytes | None) -> Version | str | None:
        """Take a record. Returns the version that it completes, a sentence when it closes one
        that cannot be used, None while more is to come."""
        deck, _, rest = (key or b"").decode(errors="replace").partition("/")
        version, _, part = rest.partition("/")
        if not part:
            return f"{deck!r} is no key of a deck's record"
        chunks = self._chunks.setdefault((deck, version), {})
        if part != _MANIFEST:
            chunks[part] = value or b""
            return None
        del self._chunks[deck, version]
        if not value:
            return None  # somebody took it back
        try:
            manifest = msgspec.json.decode(value, type=DeckManifest)
            whole = b"".join(chunks[str(number)] for number in range(manifest.chunks))
            text = _inflated(whole, manifest.size)
        except (msgspec.MsgspecError, zlib.error, KeyError) as error:
            return f"{deck}/{version} cannot be read: {type(error).__name__}"
        if (manifest.deck, manifest.version) != (deck, version):
            return f"{deck}/{version} calls itself {manifest.deck}/{manifest.version}"
        if sha256(text).hexdigest() != manifest.sha256:
            return f"{deck}/{version} is not what its manifest says"
        return Version(manifest, whole)
