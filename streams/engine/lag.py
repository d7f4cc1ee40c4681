"""Lag in seconds, told without any record's timestamp.

A mark is where the sources ended at some moment. Whoever has booked up to the mark is level with
that moment, however much has come since.
"""

from collections.abc import Mapping

from aiokafka import TopicPartition


class Lag:
    """For how long a shard has not been level with its sources; seconds of a monotonic clock."""

    def __init__(self, level_at: float) -> None:
        self._level_at = level_at
        self._marked_at = level_at
        self._mark: Mapping[TopicPartition, int] | None = None

    def look(
        self, now: float, reached: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
    ) -> None:
        """Compare what is booked with where the sources end at `now`."""
        if _passed(reached, ends):
            self._level_at = now
            self._mark = None
        elif self._mark is None or _passed(reached, self._mark):
            if self._mark is not None:
                self._level_at = self._marked_at
            self._marked_at, self._mark = now, dict(ends)

    def seconds(self, now: float) -> float:
        """How long ago everything was booked that had been written until then."""
        return max(0.0, now - self._level_at)


def _passed(reached: Mapping[TopicPartition, int], mark: Mapping[TopicPartition, int]) -> bool:
    return all(reached.get(tp, 0) >= end for tp, end in mark.items())
