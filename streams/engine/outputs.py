"""The record batches of one transaction."""

from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder

_NO_HEADERS: Final[list[tuple[str, bytes]]] = []


class _Batch:
    """A record batch that takes records. They go straight to the compiled builder: the client's
    own `append` asks for serializers, of which there are none, with every record."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.append = builder._builder.append  # noqa: SLF001  # a contract test watches the names
        self.count = 0

    def closed(self) -> Any:
        """The client's object, which takes no more."""
        self.builder._relative_offset = self.count  # noqa: SLF001
        self.builder.close()
        return self.builder


class Outputs:
    """Record batches of one transaction, by (topic, partition); nothing is sent before commit."""

    def __init__(self, producer: AIOKafkaProducer, timestamp_ms: int) -> None:
        self._producer = producer
        self._timestamp_ms = timestamp_ms
        self._open: dict[tuple[str, int], _Batch] = {}
        self._full: dict[tuple[str, int], list[BatchBuilder]] = {}

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes]] = _NO_HEADERS,
    ) -> None:
        """Add a record; a full batch is followed by another."""
        place = (topic, partition)
        batch = self._open.get(place)
        if batch is None:
            batch = self._open[place] = _Batch(self._producer.create_batch())
            self._full[place] = []
        stamp = self._timestamp_ms
        if batch.append(batch.count, stamp, key, value, headers) is None:
            self._full[place].append(batch.closed())
            batch = self._open[place] = _Batch(self._producer.create_batch())
            added = batch.append(batch.count, stamp, key, value, headers)
            assert added is not None, "an empty batch takes any record"
        batch.count += 1

    def batches(self) -> list[tuple[str, int, BatchBuilder]]:
        """Every batch, closed, in the order in which they must be sent."""
        ordered: list[tuple[str, int, BatchBuilder]] = []
        for (topic, partition), batch in self._open.items():
            ordered += [(topic, partition, full) for full in self._full[topic, partition]]
            ordered.append((topic, partition, batch.closed()))
        return ordered
