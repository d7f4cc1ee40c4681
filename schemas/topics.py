"""Every topic, once: partitions, cleanup, retention, who writes and who reads.

`credits topics`, the compose file, the documentation's table and the tests all read this list.
"""

from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Final

from msgspec import Struct

# Divides by 1, 2, 3, 4 and 6 workers. It can never change in place: a key would move.
PARTITIONS: Final = 12

DAY_MS: Final = 86_400_000
# What a producer of usage may send at most; a dead letter adds its headers to it.
MAX_RECORD_BYTES: Final = 1_048_588
# Ids are remembered for 35 days; a week's generation goes as a whole, and a day to spare.
SEEN_KEPT_DAYS: Final = 43
DLQ_HEADROOM_BYTES: Final = 65_536


class Direction(StrEnum):
    """Seen from this product."""

    IN = "in"
    OUT = "out"
    INTERNAL = "internal"


class Topic(Struct, frozen=True, kw_only=True):
    """One topic as it must exist: `name` is without the namespace; `config` in Kafka's own
    names and text values. `partitions` None means the installation's partition count."""

    name: str
    direction: Direction
    meaning: str
    config: Mapping[str, str]
    partitions: int | None = None


def _delete(days: int, **more: str) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(days * DAY_MS if days > 0 else -1),
        "max.message.bytes": str(MAX_RECORD_BYTES),
        **{name.replace("_", "."): value for name, value in more.items()},
    }


def _compact() -> dict[str, str]:
    return {
        "cleanup.policy": "compact",
        # Hours, not a week: an open segment is never compacted and restore reads it all.
        "segment.ms": str(6 * 3_600_000),
        "min.cleanable.dirty.ratio": "0.2",
        # Longer than the longest outage of a reader, or it misses a tombstone.
        "delete.retention.ms": str(7 * DAY_MS),
        "max.message.bytes": str(MAX_RECORD_BYTES),
    }


CALL_USAGE: Final = "telephony.call.usage.v1"
CONFERENCE_USAGE: Final = "telephony.conference.usage.v1"
COMMAND: Final = "credits.command.v1"
RESULT: Final = "payments.recharge.result.v1"
REQUESTED: Final = "payments.recharge.requested.v1"
LEDGER: Final = "credits.ledger.entry.v1"
BALANCE: Final = "credits.balance.v1"
NOTIFICATION: Final = "credits.notification.v1"
CHANGELOG: Final = "credits-accounts-changelog"
SEEN: Final = "credits-seen-changelog"
TARIFF: Final = "credits.tariff.v1"

# The four source topics, in the order in which waiting records are read on opening.
SOURCES: Final = (COMMAND, RESULT, CALL_USAGE, CONFERENCE_USAGE)
USAGE: Final = (CALL_USAGE, CONFERENCE_USAGE)


def dead_letters_of(source: str) -> str:
    """The dead letter topic of a source topic."""
    return f"{source}.credits.dlq"


def _dead_letters(source: str) -> Topic:
    config = _delete(30)
    config["max.message.bytes"] = str(MAX_RECORD_BYTES + DLQ_HEADROOM_BYTES)
    return Topic(
        name=dead_letters_of(source),
        direction=Direction.OUT,
        meaning=f"records of {source} that could not be booked, byte for byte",
        config=config,
    )


MANIFEST: Final = (
    Topic(
        name=CALL_USAGE,
        direction=Direction.IN,
        meaning="call legs: start, progress, end, correction",
        config=_delete(14),
    ),
    Topic(
        name=CONFERENCE_USAGE,
        direction=Direction.IN,
        meaning="conference dial-in, dial-out and VoIP legs, same phases",
        config=_delete(14),
    ),
    Topic(
        name=COMMAND,
        direction=Direction.IN,
        meaning="what administrators and operators ask; written by the command line only",
        config=_delete(30),
    ),
    Topic(
        name=RESULT,
        direction=Direction.IN,
        meaning="answers of the payment service",
        config=_delete(30),
    ),
    Topic(
        name=REQUESTED,
        direction=Direction.OUT,
        meaning="recharge requests",
        config=_delete(30),
    ),
    Topic(
        name=LEDGER,
        direction=Direction.OUT,
        meaning="every booked movement, numbered per tenant, hash-chained",
        config=_delete(-1),
    ),
    Topic(
        name=BALANCE,
        direction=Direction.OUT,
        meaning="latest public state per tenant",
        config=_compact(),
    ),
    Topic(
        name=NOTIFICATION,
        direction=Direction.OUT,
        meaning="notices, answers to commands, withheld recharges",
        config=_delete(90),
    ),
    *(_dead_letters(source) for source in SOURCES),
    Topic(
        name=TARIFF,
        direction=Direction.IN,
        meaning="versions of rate decks; written by `credits tariff publish` only",
        config=_compact(),
        # Every worker reads all of it, in one order.
        partitions=1,
    ),
    Topic(
        name=CHANGELOG,
        direction=Direction.INTERNAL,
        meaning="the account table",
        config=_compact(),
    ),
    Topic(
        name=SEEN,
        direction=Direction.INTERNAL,
        meaning="ids of booked events, packed",
        config=_delete(SEEN_KEPT_DAYS, **{"message_timestamp_type": "LogAppendTime"}),
    ),
)


class Names(Struct, frozen=True, kw_only=True):
    """The names topics have in one installation.

    `namespace` prefixes every default name; a name that is set is taken as it is. Changelogs
    carry the app id, which carries the namespace.
    """

    namespace: str = ""
    call_usage: str | None = None
    conference_usage: str | None = None
    requested: str | None = None
    result: str | None = None

    def of(self, topic: str) -> str:
        """The name on the cluster of a topic of the manifest (also of a dead letter topic)."""
        return _name_of(self, topic)

    @property
    def sources(self) -> tuple[str, ...]:
        """The four source topics' names, in the order of `SOURCES`."""
        return _names_of_sources(self)


# They are asked for with every batch and every notice.
@cache
def _name_of(names: Names, topic: str) -> str:
    source, dlq, _ = topic.partition(".credits.dlq")
    chosen = {
        CALL_USAGE: names.call_usage,
        CONFERENCE_USAGE: names.conference_usage,
        REQUESTED: names.requested,
        RESULT: names.result,
    }.get(source)
    return (chosen if chosen is not None else names.namespace + source) + dlq


@cache
def _names_of_sources(names: Names) -> tuple[str, ...]:
    return tuple(names.of(topic) for topic in SOURCES)
