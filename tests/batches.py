"""What is in a record batch of the engine, as the client's own parser reads it."""

from typing import Any

from aiokafka.record.memory_records import MemoryRecords

from streams.engine.record_batch import RecordBatch


def parsed(sent: bytes) -> tuple[Any, list[Any]]:
    """The one batch in these bytes, and its records."""
    batches = MemoryRecords(sent)
    batch = batches.next_batch()
    assert batch.validate_crc()
    assert batches.next_batch() is None
    return batch, list(batch)


def records_of(batch: RecordBatch) -> list[Any]:
    """The records of a batch; it takes no more then."""
    return parsed(batch._build())[1]
