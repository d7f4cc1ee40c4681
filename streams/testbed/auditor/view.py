"""What an audit looks at: its options, and how far it sees on one partition."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.records import EVER, PLAIN, Log, Place, Record, home, utc
from streams.testbed.auditor.verdict import Report

POSITION: Final = b"\0position"
# Where what a batch says has the batch's instant.
_DECIDED_AT: Final[Mapping[str, str]] = {
    topics.LEDGER: "booked_at",
    topics.BALANCE: "as_of",
    topics.NOTIFICATION: "at",
    topics.REQUESTED: "requested_at",
}


class Options(Struct, frozen=True, kw_only=True):
    """What to look at, and how long."""

    tenant: str | None = None
    partition: int | None = None
    deck: Path | None = None
    coverage: Path | None = None
    expect: Path | None = None
    checkpoint_from: Path | None = None
    checkpoint_to: Path | None = None
    deadline_s: int = 600
    # For so long an open transaction is waited for. The broker ends one of a worker that is gone
    # after 15 s, and looks for such every 10 s.
    open_within_s: int = 30


class View:
    """One partition as an audit sees it, at the instant of its position: what was read of it, how
    far it is booked, and what an audit before it has said (`earlier`). Workers go on meanwhile:
    what is not booked by then, and what comes of it, is for the next audit. `names` are what
    topics are called here."""

    def __init__(
        self,
        report: Report,
        log: Log,
        *,
        names: Mapping[str, str],
        partitions: int,
        options: Options,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self.report = report
        self.log = log
        self.names = names
        self.partitions = partitions
        self.options = options
        self.earlier = earlier
        self.position: dict[str, Any] = json.loads(log.rows.get(POSITION, b"{}"))
        self._records: dict[str, Sequence[Record]] = {}
        self._later: dict[str, Sequence[Record]] = {}
        for topic, read in log.records.items():
            records = list(read)
            ends = self._ends_at(topic, records)
            self._records[topic], self._later[topic] = records[:ends], records[ends:]
        self._since: dict[str, datetime] = {}
        # From when on earlier audits have kept of commands and calls what matters here.
        self._kept_since = EVER
        if earlier is not None:
            said = earlier.get("kept_since")
            self._kept_since = self.after if said is None else utc(said)

    @property
    def now(self) -> datetime | None:
        """The instant of the position; None where nothing was ever booked."""
        return utc(self.position["now"]) if self.position else None

    @property
    def after(self) -> datetime:
        """The first instant after the position: what comes then, a later audit sees."""
        return EVER if self.now is None else self.now + timedelta(microseconds=1)

    def remembered(self, name: str, default: Any = ()) -> Any:
        """What an earlier audit has said under a name."""
        return default if self.earlier is None else self.earlier.get(name, default)

    def where(self, topic: str) -> str:
        """What this partition of a topic is called."""
        return f"{self.names[topic]}/{self.log.partition}"

    def records(self, topic: str) -> Sequence[Record]:
        """What was read of a topic, up to the position."""
        return self._records.get(topic, ())

    def later(self, topic: str) -> Sequence[Record]:
        """What was read of a topic beyond the position."""
        return self._later.get(topic, ())

    def _ends_at(self, topic: str, records: Sequence[Record]) -> int:
        """How many of a topic's records the position covers."""
        if topic in topics.SOURCES:
            return bisect_left(records, self.next_of(topic), key=lambda one: one.offset)
        ends = at = len(records)
        if self.now is None:
            return ends
        again = self._asked_again(records) if topic == topics.REQUESTED else ()
        # From the end: what stands between others that are covered is not taken out, so that it is
        # judged. A request that is made again has the instant of the first time, and says nothing.
        while at:
            at -= 1
            if self._is_later(topic, records[at]):
                ends = at
            elif at not in again:
                break
        return ends

    def _asked_again(self, records: Sequence[Record]) -> set[int]:
        """The places of requests that stand further ahead too, or were read before."""
        again = set()
        known = {name for asked in self.remembered("requests", {}).values() for name in asked}
        for at, record in enumerate(records):
            name = PLAIN.decode(record.value or b"{}").get("recharge_id")
            if name in known:
                again.add(at)
            known.add(name)
        return again

    def _is_later(self, topic: str, record: Record) -> bool:
        """Whether a record was decided after the position: the one that it comes of is not booked,
        or, where it names none, its instant is a later one."""
        place = cause_of(topic, record)
        if place is not None:
            return not self.below(place)
        return decided_at(topic, record) > (self.now or EVER)

    def complete_since(self, topic: str) -> datetime:
        """From when on everything that was written to a topic has been read, in this audit or in an
        earlier one; one that did not say so had not read all of it."""
        found = self._since.get(topic)
        if found is None:
            earlier = EVER
            if self.earlier is not None and "since" in self.earlier:
                earlier = utc(self.earlier["since"].get(topic, EVER.isoformat()))
            elif self.earlier is not None:
                earlier = self.after
            found = self._since[topic] = max(earlier, self.log.complete_since(topic))
        return found

    def complete(self, topic: str) -> bool:
        """Whether everything that was ever written to a topic has been read."""
        return self.complete_since(topic) == EVER

    def known_since(self, *of: str) -> datetime:
        """From when on everything was seen that some topics were told, in this audit or in earlier
        ones that have kept what matters of it."""
        return max((self._kept_since, *map(self.complete_since, of)))

    @property
    def knows_commands(self) -> bool:
        """Whether all commands and their answers were seen."""
        return self.known_since(topics.COMMAND, topics.NOTIFICATION) == EVER

    def wanted(self, tenant: str) -> bool:
        """Whether this tenant is looked at."""
        return self.options.tenant is None or tenant == self.options.tenant

    def next_of(self, topic: str) -> int:
        """Offsets below this are booked."""
        source = self.position.get("sources", {}).get(self.names[topic])
        return int(source["next"]) if source else 0

    def below(self, place: Place) -> bool:
        """Whether a place is below the position (ticks have no place and always are)."""
        return place[0] == "tick" or place[2] < self.next_of(place[0])

    def strayed(self, record: Record) -> bool:
        """Whether a record stands on a partition that is not its key's."""
        return record.key is not None and home(record.key, self.partitions) != record.partition

    def judge_home(self, record: Record, what: str) -> None:
        """What we write stands where its key belongs."""
        if self.strayed(record):
            self.report.violate(
                "partition", f"{what} at {record.topic}/{record.partition}/{record.offset}"
            )

    def checkpoint(self) -> dict[str, Any]:
        """From when on a later audit has seen all of each topic."""
        # What comes after this audit is seen, also where nothing at all is left.
        seen = {topic: min(self.complete_since(topic), self.after) for topic in self.names}
        return {
            "since": {topic: since.isoformat() for topic, since in seen.items() if since != EVER},
            "kept_since": self._kept_since.isoformat(),
            "ends": {topic: later[0].offset for topic, later in self._later.items() if later},
        }


def cause_of(topic: str, record: Record) -> Place | None:
    """The record of a source topic that an output comes of; None where it names none."""
    if topic == topics.LEDGER:
        cause = PLAIN.decode(record.value or b"")["caused_by"]
        place = (cause["topic"], cause["partition"], cause["offset"])
        return place if place[0] in topics.SOURCES else None
    headers = dict(record.headers)
    if topic == topics.NOTIFICATION:
        # tenant/topic/partition/offset/number
        named = headers.get("ce_id", b"").decode().split("/")
        if len(named) == 5 and named[1] in topics.SOURCES:
            return (named[1], int(named[2]), int(named[3]))
    elif topic not in _DECIDED_AT:
        source = next(one for one in topics.SOURCES if topics.dead_letters_of(one) == topic)
        offset = int(headers["credits-dlq-offset"])
        return (source, int(headers["credits-dlq-partition"]), offset)
    return None


def decided_at(topic: str, record: Record) -> datetime:
    """The instant of the batch of an output, which no other batch has."""
    said = PLAIN.decode(record.value or b"{}")
    return utc(said.get(_DECIDED_AT[topic]) or EVER.isoformat())
