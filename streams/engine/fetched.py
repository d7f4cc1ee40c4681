"""What a fetch has brought, read into records.

All records of the sources come through here, and at a restore the whole table. The client's own
parser makes two objects for each of them that the garbage collector follows, and it was these
that made it run; a record here is one that it need not know. Where a batch begins and ends,
whether it is whole and to whose transaction it belongs is still read by the client.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, final

from aiokafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.memory_records import MemoryRecords
from mypy_extensions import i64, mypyc_attr

# By the number that stands in a batch's attributes.
_CODECS: Final[dict[int, Callable[[bytes], bytes]]] = {
    0: bytes,
    1: gzip_decode,
    2: snappy_decode,
    3: lz4_decode,
    4: zstd_decode,
}
# Where a batch says how long it is from there on, in all formats; and in format 2 how many records
# it has, and where they begin.
_LENGTH_AT: Final = 8
_COUNT_AT: Final = 57
_RECORDS_AT: Final = 61

RecordHeaders = Sequence[tuple[str, bytes | None]]
# Most records have none; this one object is theirs.
_NO_HEADERS: Final[RecordHeaders] = ()


@final
@mypyc_attr(acyclic=True)
class Record:
    """A record as it was fetched. `timestamp` is in ms since 1970, or −1 when it has none."""

    __slots__ = ("headers", "key", "offset", "timestamp", "value")

    def __init__(
        self,
        offset: i64,
        timestamp: i64,
        key: bytes | None,
        value: bytes | None,
        headers: RecordHeaders,
    ) -> None:
        self.offset = offset
        self.timestamp = timestamp
        self.key = key
        self.value = value
        self.headers = headers


@final
class Batch:
    """A batch of records that are no control records. The client takes it for a batch of one
    record which has the last offset, and so goes once round its loop for all of them."""

    __slots__ = (
        "_batch",
        "_begin",
        "_data",
        "_end",
        "base_offset",
        "is_control_batch",
        "is_transactional",
        "next_offset",
        "offset",
        "producer_id",
    )

    def __init__(self, batch: Any, data: bytes, begin: i64, end: i64) -> None:
        """`batch` is the client's object for what stands in the fetched bytes from `begin` on."""
        self._batch = batch
        self._data = data
        self._begin = begin
        self._end = end
        self.base_offset: int = batch.base_offset
        self.next_offset: int = batch.next_offset
        self.offset = self.next_offset - 1
        self.producer_id: int = batch.producer_id
        self.is_transactional: bool = batch.is_transactional
        self.is_control_batch = False

    def validate_crc(self) -> bool:
        """Whether the bytes are those that were written."""
        return bool(self._batch.validate_crc())

    def __iter__(self) -> Iterator["Batch"]:
        return iter((self,))

    def records(self, first: int) -> list[Record]:
        """Its records from an offset on. Raises CorruptRecordException, and what a codec does."""
        batch, data, begin = self._batch, self._data, self._begin
        decompress = _CODECS[batch.compression_type]
        unpacked = decompress(data[begin + _RECORDS_AT : self._end])
        count = _int32(data, begin + _COUNT_AT)
        # At log append time one timestamp stands for all records.
        common = bool(batch.timestamp_type)
        base_timestamp: int = batch.max_timestamp if common else batch.first_timestamp
        try:
            return _parse(unpacked, count, self.base_offset, base_timestamp, common, first)
        except IndexError:
            raise CorruptRecordException("a record ends too early") from None


@final
class Batches:
    """The batches of a fetch, in place of the client's `MemoryRecords`. Control records, older
    formats and codecs we do not know are left to the client."""

    __slots__ = ("_begin", "_client", "_data")

    def __init__(self, data: bytes | None) -> None:
        # The protocol allows a broker to say nothing at all.
        self._data = data or b""
        self._client: Any = MemoryRecords(self._data)
        self._begin: i64 = 0

    def size_in_bytes(self) -> int:
        """Of the whole fetch."""
        return len(self._data)

    def has_next(self) -> bool:
        """Whether there is another batch, as a whole."""
        return bool(self._client.has_next())

    def next_batch(self) -> Any:
        """The next one. Raises CorruptRecordException."""
        batch = self._client.next_batch()
        begin, data = self._begin, self._data
        end = begin + _LENGTH_AT + 4 + _int32(data, begin + _LENGTH_AT)
        self._begin = end
        if (
            type(batch) is not DefaultRecordBatch
            or batch.is_control_batch
            or batch.compression_type not in _CODECS
        ):
            return batch
        return Batch(batch, data, begin, end)


def _parse(
    data: bytes, count: i64, base_offset: i64, base_timestamp: i64, common: bool, first: i64
) -> list[Record]:
    """Raises IndexError where a number is missing. A slice that would go past the end is short,
    and the place after it is one where nothing can be read."""
    records: list[Record] = []
    size: i64 = len(data)
    at: i64 = 0
    while count > 0:
        count -= 1
        length, at = _number(data, at)
        end = at + length
        _attributes, at = _number(data, at)
        timestamp_delta, at = _number(data, at)
        offset_delta, at = _number(data, at)
        key, at = _nullable(data, at)
        value, at = _nullable(data, at)
        headers = _NO_HEADERS
        length, at = _number(data, at)
        if length != 0:
            headers, at = _headers(data, at, length)
        if at != end:
            raise CorruptRecordException("a record is not as long as it says")
        offset = base_offset + offset_delta
        if offset >= first:
            timestamp = base_timestamp if common else base_timestamp + timestamp_delta
            records.append(Record(offset, timestamp, key, value, headers))
            first = offset + 1
    if at != size:
        raise CorruptRecordException("there is something after the last record")
    return records


def _headers(data: bytes, at: i64, count: i64) -> tuple[RecordHeaders, i64]:
    """A record's headers, and where they end."""
    if count < 0:
        raise CorruptRecordException("a record has fewer than no headers")
    headers: list[tuple[str, bytes | None]] = []
    while count > 0:
        count -= 1
        length, at = _number(data, at)
        if length < 0:
            raise CorruptRecordException("a header has no name")
        # One that is not UTF-8 must stop nobody; it is told with backslashes.
        name = data[at : at + length].decode("utf-8", "backslashreplace")
        at += length
        content, at = _nullable(data, at)
        headers.append((name, content))
    return headers, at


def _nullable(data: bytes, at: i64) -> tuple[bytes | None, i64]:
    """Bytes behind their length, which is below zero for None; and where they end."""
    length, at = _number(data, at)
    if length < 0:
        return None, at
    end = at + length
    return data[at:end], end


def _number(data: bytes, at: i64) -> tuple[i64, i64]:
    """A number of variable length, and where it ends. Its lowest bit is the sign."""
    byte: i64 = data[at]
    at += 1
    sign = -(byte & 1)
    number = (byte & 0x7F) >> 1
    shift: i64 = 6
    while byte >= 0x80:
        byte = data[at]
        at += 1
        if shift == 62 and byte > 1:
            raise CorruptRecordException("a number has more than 64 bits")
        number |= (byte & 0x7F) << shift
        shift += 7
    return number ^ sign, at


def _int32(data: bytes, at: i64) -> i64:
    """A length or a count of four bytes."""
    first: i64 = data[at]
    second: i64 = data[at + 1]
    third: i64 = data[at + 2]
    fourth: i64 = data[at + 3]
    return first << 24 | second << 16 | third << 8 | fourth
