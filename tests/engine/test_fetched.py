"""Fetched records are what the client's own parser reads, whatever was fetched.

These run on the sources and, in `make test`, on the compiled module too.
"""

import gc
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError
from aiokafka.record import default_records
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c, decode_varint_py
from hypothesis import given
from hypothesis import strategies as st

from streams.engine import fetched, kafka
from streams.engine.record_batch import RecordBatch, header, header_name, varint

TP = TopicPartition("t", 0)
COMMITTED, UNCOMMITTED = 1, 0
ABORT, COMMIT = b"\0\0\0\0", b"\0\0\0\1"
LOG_APPEND_TIME, TRANSACTIONAL, CONTROL = 0x08, 0x10, 0x20

Written = tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]


def a_batch(
    records: list[Written],
    *,
    base: int = 0,
    codec: int = 0,
    attributes: int = 0,
    producer: int = -1,
    last_delta: int | None = None,
) -> bytes:
    """A batch as a broker would hand it out: records by offset delta, as the client writes them."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, producer, 0, 0, 1 << 30)
    for delta, timestamp, key, value, headers in records:
        assert builder.append(delta, timestamp, key=key, value=value, headers=headers) is not None
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base)
    (written,) = struct.unpack_from(">h", data, 21)
    struct.pack_into(">h", data, 21, written | attributes)
    if last_delta is not None:
        struct.pack_into(">i", data, 23, last_delta)
    return sealed(data)


def sealed(data: bytearray) -> bytes:
    """With the checksum of what the batch holds now."""
    struct.pack_into(">I", data, 17, calc_crc32c(bytes(data[21:])))
    return bytes(data)


def some(*deltas: int, value: bytes = b"v") -> list[Written]:
    return [(delta, 1_000 + delta, b"k", value, []) for delta in deltas]


def a_marker(base: int, producer: int, key: bytes) -> bytes:
    records: list[Written] = [(0, 1, key, b"\0" * 6, [])]
    return a_batch(records, base=base, producer=producer, attributes=TRANSACTIONAL | CONTROL)


class _Place:
    """As much of a consumer's state as a fetch result looks at."""

    active = True
    paused = False

    def __init__(self, position: int) -> None:
        self.position = position

    def state_value(self, _: TopicPartition) -> "_Place":
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def _told(record: Any) -> tuple[Any, ...]:
    return record.offset, record.timestamp, record.key, record.value, tuple(record.headers)


def drained(
    ours: bool,
    data: bytes,
    *,
    first: int = 0,
    sizes: list[int | None] | None = None,
    aborted: list[tuple[int, int]] | None = None,
    isolation: int = COMMITTED,
    check_crcs: bool = True,
) -> list[Any]:
    """What one fetch yields in turns of these sizes, with the position after each and whether
    there is more; of an error the type."""
    place = _Place(first)
    batches = fetched.Batches if ours else MemoryRecords
    records = kafka._PlainRecords if ours else fetcher.PartitionRecords
    result = (kafka._PlainResult if ours else fetcher.FetchResult)(
        TP,
        assignment=place,
        partition_records=records(
            TP, batches(data), aborted, first, None, None, check_crcs, isolation
        ),
        backoff=0,
    )
    told: list[Any] = []
    for size in sizes or [None]:
        if not result.has_more():
            break
        try:
            got = [_told(record) for record in result.getall(size)]
        except Exception as error:
            told.append(type(error))
            got = []
        told.append((got, place.position, result.has_more()))
    return told


def both(data: bytes, **how: Any) -> list[Any]:
    """What ours yields, which is what the client's yields."""
    ours = drained(True, data, **how)
    assert ours == drained(False, data, **how)
    return ours


def offsets(told: list[Any]) -> list[int]:
    return [record[0] for got, _, _ in told for record in got]


# Around the places where a length, a delta or a count takes another byte.
BORDERS = [0, 1, 62, 63, 64, 65, 8_190, 8_191, 8_192, 8_193]
payloads = st.none() | st.binary(max_size=80) | st.sampled_from(BORDERS).map(lambda n: b"x" * n)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
headers = st.lists(st.tuples(names, st.none() | st.binary(max_size=70)), max_size=3)
stamps = st.integers(0, 1 << 45) | st.sampled_from([0, -1, (1 << 63) - 1])


@st.composite
def batches(draw: st.DrawFn) -> bytes:
    """Some batches behind one another, with gaps between and within them."""
    data, base = b"", draw(st.integers(0, 1 << 40))
    for _ in range(draw(st.integers(1, 3))):
        deltas = sorted(draw(st.sets(st.sampled_from([0, 1, 2, *BORDERS]), max_size=5)))
        last = (deltas[-1] if deltas else 0) + draw(st.integers(0, 2))
        data += a_batch(
            [(at, draw(stamps), draw(payloads), draw(payloads), draw(headers)) for at in deltas],
            base=base,
            codec=draw(st.integers(0, 4)) if deltas else 0,  # as a broker leaves an emptied one
            attributes=draw(st.sampled_from([0, 0, LOG_APPEND_TIME])),
            last_delta=last,
        )
        base += last + 1 + draw(st.integers(0, 3))
    return data


@given(batches(), st.data())
def test_records_are_read_as_the_client_reads_them(fetch: bytes, data: st.DataObject) -> None:
    (base,) = struct.unpack_from(">q", fetch)
    sizes = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=5))
    both(fetch, first=base + data.draw(st.integers(0, 5)), sizes=sizes)


@given(batches(), st.data())
def test_a_fetch_with_a_wrong_bit_is_refused(fetch: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(fetch) - 1))
    broken = bytearray(fetch)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    told = both(bytes(broken))
    (length,) = struct.unpack_from(">i", fetch, 8)
    if 17 <= at < 12 + length:  # what the first batch's checksum is of, and the checksum
        assert told[0] is CorruptRecordException


@given(batches(), st.data())
def test_what_is_missing_of_a_fetch_is_not_read(fetch: bytes, data: st.DataObject) -> None:
    both(fetch[: data.draw(st.integers(0, len(fetch) - 1))])


@pytest.mark.parametrize("data", [None, b""])
def test_a_fetch_may_bring_nothing(data: bytes | None) -> None:
    batches = fetched.Batches(data)
    assert not batches.has_next()
    assert batches.size_in_bytes() == 0


@pytest.fixture(scope="module")
def careful_client() -> Iterator[None]:
    """The client's parser without its machine code, which reads on behind the end."""
    with pytest.MonkeyPatch.context() as patch:
        reading = default_records._DefaultRecordBatchPy._read_msg
        patch.setattr(reading, "__defaults__", (decode_varint_py,))
        yield


@given(st.data())
def test_without_a_checksum_nothing_is_read_that_the_client_would_not(
    careful_client: None, data: st.DataObject
) -> None:
    records: list[Written] = [
        (0, 1_000, b"key", b"value", []),
        (1, 1_070, None, b"v" * 70, [("name", b"text"), ("n", None)]),
        (70, 900, b"", None, []),
    ]
    batch = bytearray(a_batch(records, base=7))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(57, len(batch) - 1))
        batch[at] = data.draw(st.integers(0, 255))
    batch = batch[: len(batch) - data.draw(st.sampled_from([0, 0, 0, 1, 5, 40]))]
    struct.pack_into(">i", batch, 8, len(batch) - 12)
    sealed(batch)
    whole = bytes(batch)
    try:
        read = fetched.Batches(whole).next_batch().records(-(1 << 62))
    except CorruptRecordException:
        return
    try:
        expected = list(default_records._DefaultRecordBatchPy(whole))
    except UnicodeDecodeError:
        return  # the client reads no header whose name is not UTF-8
    seen = [_told(record) for record in expected]
    kept = [one for at, one in enumerate(seen) if all(one[0] > before[0] for before in seen[:at])]
    assert [_told(record) for record in read] == kept


def test_a_header_whose_name_is_no_text_is_told_with_backslashes() -> None:
    batch = RecordBatch(1_000, 900_000)
    assert batch.add(b"k", b"v", varint(1) + header(varint(3) + b"a\xff\xfe", b"1"))
    built = bytes(batch._build())
    [record] = fetched.Batches(built).next_batch().records(0)
    assert list(record.headers) == [("a\\xff\\xfe", b"1")]
    # What is written of it again can be read by anybody.
    assert header_name("a\\xff\\xfe") == varint(9) + rb"a\xff\xfe"


@pytest.mark.parametrize("isolation", [COMMITTED, UNCOMMITTED])
@pytest.mark.parametrize("sizes", [[None], [1] * 12, [2, None], [4, 4, 4]])
def test_aborted_records_and_control_records_are_not_handed_out(
    isolation: int, sizes: list[int | None]
) -> None:
    fetch = b"".join(
        [
            a_batch(some(0, 1), base=0, producer=1, attributes=TRANSACTIONAL),
            a_batch(some(0, 1), base=2, producer=2, attributes=TRANSACTIONAL, codec=3),
            a_marker(4, 1, ABORT),
            a_batch(some(0, 1), base=5, producer=1, attributes=TRANSACTIONAL),
            a_batch(some(0), base=7),
            a_marker(8, 2, COMMIT),
            a_marker(9, 1, COMMIT),
        ]
    )
    told = both(fetch, aborted=[(1, 0)], isolation=isolation, sizes=sizes)
    aborted = [] if isolation == COMMITTED else [0, 1]
    assert offsets(told) == [*aborted, 2, 3, 5, 6, 7]
    if not told[-1][2]:
        assert told[-1][1] == 10


def test_records_before_the_position_are_left_out() -> None:
    fetch = a_batch(some(0, 1, 2), base=10) + a_batch(some(0), base=13)
    assert offsets(both(fetch, first=12)) == [12, 13]


def test_what_compaction_has_emptied_still_moves_the_position() -> None:
    fetch = a_batch(some(0, 3), base=5, last_delta=6) + a_batch([], base=12, last_delta=8)
    assert [told[1] for told in both(fetch, first=5)] == [21]


def test_one_by_one_the_position_follows_each_record() -> None:
    fetch = a_batch(some(0, 4), base=5, last_delta=6)
    place = _Place(5)
    records = kafka._PlainRecords(TP, fetched.Batches(fetch), [], 5, None, None, True, COMMITTED)
    result = kafka._PlainResult(TP, assignment=place, partition_records=records, backoff=0)
    positions = []
    while (record := result.getone()) is not None:
        positions.append((record.offset, place.position))
    assert positions == [(5, 6), (9, 10)]
    assert place.position == 12
    assert next(records, "no more") == "no more"


def test_what_was_handed_out_in_part_is_void_after_a_seek() -> None:
    place = _Place(0)
    records = kafka._PlainRecords(
        TP, fetched.Batches(a_batch(some(0, 1, 2))), [], 0, None, None, True, COMMITTED
    )
    result = kafka._PlainResult(TP, assignment=place, partition_records=records, backoff=0)
    assert len(result.getall(2)) == 2
    place.position = 1
    assert result.getall(2) == []
    assert not result.has_more()


def test_a_broken_batch_behind_a_sound_one_gives_nothing_and_leaves_the_position() -> None:
    second = bytearray(a_batch(some(0), base=1))
    second[-1] ^= 1
    told = both(a_batch(some(0)) + bytes(second))
    assert told[0] is CorruptRecordException
    assert told[1][:2] == ([], 0)


def test_the_checksum_is_looked_at_only_when_it_is_asked_for() -> None:
    fetch = bytearray(a_batch(some(0)))
    fetch[17] ^= 1
    assert both(bytes(fetch))[0] is CorruptRecordException
    assert offsets(both(bytes(fetch), check_crcs=False)) == [0]


# A record's length, attributes, deltas of time and offset, key, value and count of headers.
SOUND = b"\x0c\0\0\0\1\1\0"


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(b"\x0a\0\0\0\1\1\0", id="longer than it says"),
        pytest.param(b"\x0e\0\0\0\1\1\0\0", id="shorter than it says"),
        pytest.param(b"\x1c\0\0\0\1\1\2\2n\x0atex", id="longer than the batch"),
        pytest.param(b"\x0c\0\0\0\1", id="without its end"),
        pytest.param(b"", id="without anything"),
        pytest.param(b"\x0c\0\0\0\1\1\1", id="fewer than no headers"),
        pytest.param(b"\x0e\0\0\0\1\1\2\1", id="a header without a name"),
        pytest.param(b"\x1e\0" + b"\x80" * 9 + b"\2\0\1\1\0", id="a number of 65 bits"),
        pytest.param(b"\x20\0" + b"\x80" * 10 + b"\0\0\1\1\0", id="a number of 11 bytes"),
        pytest.param(SOUND + b"\0", id="something behind it"),
        pytest.param(SOUND + SOUND, id="another one behind it"),
    ],
)
def test_a_record_that_is_not_well_formed_is_refused(records: bytes) -> None:
    def whole(content: bytes) -> bytes:
        data = bytearray(a_batch(some(0))[:61] + content)
        struct.pack_into(">i", data, 8, len(data) - 12)
        return sealed(data)

    assert offsets(both(whole(SOUND))) == [0]
    assert drained(True, whole(records))[0] is CorruptRecordException


def test_a_record_whose_offset_goes_back_is_left_out() -> None:
    assert offsets(both(a_batch(some(5, 3, 6)))) == [5, 6]


def test_at_log_append_time_all_records_have_the_brokers_timestamp() -> None:
    fetch = a_batch(some(0, 5), attributes=LOG_APPEND_TIME)
    assert [record[1] for record in both(fetch)[0][0]] == [1_005, 1_005]


@pytest.mark.parametrize("magic", [0, 1])
def test_older_formats_are_read_by_the_client(magic: int) -> None:
    builder = LegacyRecordBatchBuilder(magic, 0, 1 << 20)
    for offset in range(3):
        assert builder.append(offset, 1_000, key=b"k", value=b"v") is not None
    fetch = bytes(builder.build())
    assert offsets(both(fetch, sizes=[2, 2, 2])) == [0, 1, 2]


def test_a_codec_nobody_knows_is_left_to_the_client() -> None:
    fetch = a_batch(some(0), attributes=5)
    assert both(fetch)[0] is UnsupportedCodecError


def test_all_codecs_of_the_format_are_known() -> None:
    for codec in range(5):
        data = a_batch(some(0, 1, value=b"v" * 500), codec=codec)
        assert data[22] & 7 == codec
        assert len(both(data)[0][0]) == 2
    assert sorted(fetched._CODECS) == [0, 1, 2, 3, 4]


def test_a_record_keeps_nothing_of_the_fetch() -> None:
    whole = a_batch([(0, 1, b"key", b"value", [("name", b"text")])])
    (record,) = fetched.Batches(whole).next_batch().records(0)
    ((_, text),) = record.headers
    assert {type(record.key), type(record.value), type(text)} == {bytes}


def test_records_without_headers_share_one_object() -> None:
    whole = a_batch(some(0, 1))
    one, other = fetched.Batches(whole).next_batch().records(0)
    assert one.headers is other.headers
    assert one.headers == ()


@pytest.mark.skipif(fetched.__file__.endswith(".py"), reason="the sources, not machine code")
def test_the_garbage_collector_does_not_follow_records() -> None:
    whole = a_batch(some(0))
    (record,) = fetched.Batches(whole).next_batch().records(0)
    assert not gc.is_tracked(record)
