"""Record batches in Kafka's message format v2, made for one transactional producer.

They stand where the client's `BatchBuilder` does. The client encodes every header of every record,
twice; most headers of ours are the same in all records of a kind, so they are encoded beforehand.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final, final

from aiokafka.codec import lz4_encode
from aiokafka.record.util import calc_crc32c
from mypy_extensions import mypyc_attr

# As `encode_headers` says it: none follow.
NO_HEADERS: Final = b"\0"

# Base offset, length of what follows, leader epoch, magic, checksum of what follows.
_FRONT: Final = struct.Struct(">qiibI")
# Attributes, last offset, first and last timestamp, producer id, epoch and sequence, records.
_COVERED: Final = struct.Struct(">hiqqqhii")
_HEADER_BYTES: Final = _FRONT.size + _COVERED.size
# Magic and checksum count towards the length, as does the leader epoch.
_COUNTED_FRONT_BYTES: Final = 9
_NO_LEADER_EPOCH: Final = -1
_MAGIC: Final = 2
_LZ4: Final = 3
_TRANSACTIONAL: Final = 0x10
# Level 9, the client's, costs 2 µs a record for a few per cent of size.
_LZ4_LEVEL: Final = 1

# The length of None: -1.
_NONE: Final = b"\x01"


def _encode_varint(number: int) -> bytes:
    # Signs are the lowest bit, and nothing here is negative.
    rest = number << 1
    encoded = bytearray()
    while rest > 0x7F:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


# All that take one byte or two.
_SHORT: Final = 8_192
_VARINTS: Final = [_encode_varint(number) for number in range(_SHORT)]


def varint(number: int) -> bytes:
    """A length or a count, as a record holds it; never negative."""
    assert number >= 0
    return _VARINTS[number] if number < _SHORT else _encode_varint(number)


def header_name(name: str) -> bytes:
    """The name of a header, as `header` takes it."""
    encoded = name.encode()
    return varint(len(encoded)) + encoded


def header(name: bytes, value: bytes | None) -> bytes:
    """A header as a record holds it."""
    return name + _NONE if value is None else b"%b%b%b" % (name, varint(len(value)), value)


def encode_each(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """Headers one after the other; their number must come before them."""
    return b"".join([header(header_name(name), value) for name, value in headers])


def encode_headers(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """All headers of a record: their number, then each."""
    return varint(len(headers)) + encode_each(headers)


@final
@mypyc_attr(acyclic=True)
class RecordBatch:
    """Records of one partition and one timestamp (ms since 1970). Before it is compressed it stays
    below `limit_bytes`, but a single record may have any size."""

    __slots__ = (
        "_built",
        "_bytes",
        "_closed",
        "_count",
        "_epoch",
        "_limit_bytes",
        "_producer_id",
        "_records",
        "_sequence",
        "_timestamp_ms",
    )

    def __init__(self, timestamp_ms: int, limit_bytes: int) -> None:
        self._timestamp_ms = timestamp_ms
        self._limit_bytes = limit_bytes
        # Of each record its length and the rest.
        self._records: list[bytes] = []
        self._count = 0
        self._bytes = _HEADER_BYTES
        self._closed = False
        self._producer_id = -1
        self._epoch = -1
        self._sequence = 0
        self._built: bytes | None = None

    def add(self, key: bytes | None, value: bytes | None, headers: bytes = NO_HEADERS) -> bool:
        """Add a record, its headers encoded; says whether there was room for it."""
        assert not self._closed
        count = self._count
        # No attributes and no time since the batch's own.
        record = b"\0\0%b%b%b%b%b%b" % (
            varint(count),
            _NONE if key is None else varint(len(key)),
            b"" if key is None else key,
            _NONE if value is None else varint(len(value)),
            b"" if value is None else value,
            headers,
        )
        length = varint(len(record))
        filled = self._bytes + len(length) + len(record)
        if filled >= self._limit_bytes and count:
            return False
        self._records.append(length)
        self._records.append(record)
        self._bytes = filled
        self._count = count + 1
        return True

    # -- what the client asks of a batch; a contract test watches the names ----------------------

    def append(self, **_: Any) -> None:
        """The client's way to add a record: there is no room for it."""

    def close(self) -> None:
        """Take no more records."""
        self._closed = True

    def closed(self) -> bool:
        """Whether it takes no more records."""
        return self._closed

    def record_count(self) -> int:
        """How many records it holds."""
        return self._count

    def _set_producer_state(
        self, producer_id: int, producer_epoch: int, base_sequence: int
    ) -> None:
        assert self._built is None
        self._producer_id = producer_id
        self._epoch = producer_epoch
        self._sequence = base_sequence

    def _build(self) -> bytes:
        """As the broker gets it; the same bytes whenever it is sent again."""
        built = self._built
        if built is None:
            self._closed = True
            records = b"".join(self._records)
            self._records = []
            attributes = _TRANSACTIONAL
            compressed: bytes = lz4_encode(records, level=_LZ4_LEVEL)
            if len(compressed) < len(records):
                records = compressed
                attributes |= _LZ4
            head = _COVERED.pack(
                attributes,
                self._count - 1,
                self._timestamp_ms,
                self._timestamp_ms,
                self._producer_id,
                self._epoch,
                self._sequence,
                self._count,
            )
            covered: bytes = head + records
            length = _COUNTED_FRONT_BYTES + len(covered)
            checksum = calc_crc32c(covered)
            built = _FRONT.pack(0, length, _NO_LEADER_EPOCH, _MAGIC, checksum) + covered
            self._built = built
        return built
