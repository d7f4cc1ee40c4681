"""What can stop a shard, by name; each name is also a metric's label and a runbook's title."""

from enum import StrEnum


class Stop(StrEnum):
    """Why a shard refuses to go on. None of these heals by a restart."""

    STATE_LOST = "state_lost"
    SOURCE_TRUNCATED = "source_truncated"
    SOURCE_LOST = "source_lost"
    NOT_COPARTITIONED = "not_copartitioned"
    CLOCK_SKEW = "clock_skew"
    HANGING_TRANSACTION = "hanging_transaction"
    NEWER_ROWS = "newer_rows"


class StoppedError(Exception):
    """The shard must not go on: what Kafka holds contradicts what was booked.

    `reason` is the name; the text says what was seen and what an operator can do next. `topic`
    is the source topic it is about, if it is about one.
    """

    def __init__(self, reason: Stop, text: str, topic: str | None = None) -> None:
        super().__init__(f"{reason.value}: {text}")
        self.reason = reason
        self.topic = topic


class FencedError(Exception):
    """Another process started a producer with our transactional id: it owns the partition.

    `overdue`: or nobody did, and the broker has ended our transaction, which had been open past
    its time-out; a client is told the same in both cases.
    """

    def __init__(self, transactional_id: str, *, overdue: bool = False) -> None:
        super().__init__(transactional_id)
        self.overdue = overdue


class UnknownOutcomeError(Exception):
    """A transaction may or may not have been committed; only Kafka knows now."""


class GaveUpError(Exception):
    """The worker cannot do its work and must end (exit code 70)."""
