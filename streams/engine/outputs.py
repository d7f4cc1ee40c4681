"""The record batches of one transaction."""

from typing import Final

from streams.engine.record_batch import NO_HEADERS, RecordBatch

# Below the sources' max.message.bytes; a single larger record still makes a batch of its own.
MAX_BATCH_BYTES: Final = 900_000


class Outputs:
    """Record batches of one transaction, by (topic, partition); nothing is sent before commit."""

    def __init__(self, timestamp_ms: int) -> None:
        self._timestamp_ms = timestamp_ms
        # All of a place but the last are full.
        self._batches: dict[tuple[str, int], list[RecordBatch]] = {}
        # Where the last record went: they come in runs of one place, so it is seldom looked up.
        self._topic: str | None = None
        self._partition = -1
        self._there: list[RecordBatch] = []

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: bytes = NO_HEADERS,
    ) -> None:
        """Add a record, its headers encoded; a full batch is followed by another."""
        if topic is not self._topic or partition != self._partition:
            self._topic, self._partition = topic, partition
            self._there = self._batches.setdefault((topic, partition), [])
        there = self._there
        if not there or not there[-1].add(key, value, headers):
            batch = RecordBatch(self._timestamp_ms, MAX_BATCH_BYTES)
            added = batch.add(key, value, headers)
            assert added, "an empty batch takes any record"
            there.append(batch)

    def batches(self) -> list[tuple[str, int, RecordBatch]]:
        """Every batch, closed, in the order in which they must be sent."""
        ordered: list[tuple[str, int, RecordBatch]] = []
        for (topic, partition), batches in self._batches.items():
            for batch in batches:
                batch.close()
                ordered.append((topic, partition, batch))
        return ordered
