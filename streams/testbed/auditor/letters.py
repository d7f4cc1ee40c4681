"""Dead letters: records byte for byte, refused for what is wrong with them."""

import re
from collections.abc import Container, Mapping, Set
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct
from xxhash import xxh3_64_hexdigest

from schemas import topics
from streams.testbed.auditor.events import Event, is_sound, kind_of, number_of, understand
from streams.testbed.auditor.ledger import OF_RESULT, Ledger
from streams.testbed.auditor.prices import Tariffs
from streams.testbed.auditor.records import Place, Record, home, nanos, utc, written_at
from streams.testbed.auditor.requests import Requests
from streams.testbed.auditor.shapes import KINDS
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import View

# Why a record of each topic can be a dead letter; what a command cannot have is a notice's rule.
_OF_ALL: Final = {
    "malformed_json",
    "schema_violation",
    "key_mismatch",
    "wrong_partition",
    "conflict",
    "defect",
}
_DATED: Final = {
    *_OF_ALL,
    "unknown_tenant",
    "currency_mismatch",
    "too_late",
    "from_the_future",
    "overflow",
}
_OF_USAGE_TOPICS: Final = {*_DATED, "unrated", "not_billable", "refused"}
_REASONS: Final[Mapping[str, Set[str]]] = {
    topics.COMMAND: _OF_ALL,
    topics.RESULT: _DATED,
    topics.CALL_USAGE: _OF_USAGE_TOPICS,
    topics.CONFERENCE_USAGE: _OF_USAGE_TOPICS,
}
_USAGE_WITHIN: Final = timedelta(days=35)
_RESULT_WITHIN: Final = timedelta(days=396)
# Where a record was moved from, as its header says it; anybody can write one.
_PLACE: Final = re.compile(r".+/[0-9]{1,9}/[0-9]{1,18}")
_FUTURE: Final = timedelta(minutes=5)
# One event moves at most the one, a balance is at most the other.
_MOST_MOVED: Final = 999_999_999 * 10**9
_MOST_BALANCE: Final = 9_000_000_000 * 10**9


class Arrival(Struct, frozen=True, array_like=True):
    """A record that says that it was moved to a partition: from where, and what its bytes are.
    `seen` if no later audit will read it."""

    topic: str
    origin: str
    partition: int
    digest: str
    seen: bool = True


class Moves:
    """Records that strayed, and where they arrived, of all partitions."""

    def __init__(self) -> None:
        self._expected: dict[tuple[str, str], Record] = {}
        self._arrived: dict[tuple[str, str], list[Arrival]] = {}
        # What is there and not booked, by what a partition is called.
        self._ahead: dict[str, range] = {}
        self._partitions = 1
        self._hidden: set[tuple[str, int]] = set()

    def begin(self, view: View) -> None:
        """Look at one more partition, with what earlier audits have seen arrive there."""
        self._partitions = view.partitions
        self._hidden |= {(topic, view.log.partition) for topic in view.log.hidden}
        for topic in topics.SOURCES:
            ends = view.later(topic)[-1].offset + 1 if view.later(topic) else 0
            self._ahead[view.where(topic)] = range(view.next_of(topic), ends)
        for said in view.remembered("arrived"):
            one = msgspec.convert(said, Arrival)
            self._arrived.setdefault((one.topic, one.origin), []).append(one)

    def expect(self, topic: str, record: Record) -> None:
        """This record must have been moved."""
        self._expected[topic, f"{record.topic}/{record.partition}/{record.offset}"] = record

    def look(self, topic: str, record: Record, *, later: bool = False) -> None:
        """This record may say that it was moved here; `later`: the next audit reads it too."""
        # The last thing that was done to it: a dead letter of it may be replayed.
        for name, text in record.headers[-1:]:
            origin = text.decode(errors="replace") if name == "credits-moved-from" else ""
            if _PLACE.fullmatch(origin):
                one = Arrival(topic, origin, record.partition, _digest_of(record), seen=not later)
                self._arrived.setdefault((topic, origin), []).append(one)

    def judge(self, report: Report) -> None:
        """Every strayed record arrived once, with its bytes."""
        for (topic, origin), record in self._expected.items():
            arrivals = self._arrived.get((topic, origin), [])
            where = home(record.key or b"", self._partitions)
            if not arrivals and (topic, where) in self._hidden:
                report.unknown(
                    "partition",
                    f"a transaction is open on {topic}/{where}: behind it may stand what strayed",
                )
            elif len(arrivals) != 1:
                report.violate("partition", f"{origin} strayed and arrived {len(arrivals)} times")
            elif arrivals[0].digest != _digest_of(record):
                report.violate("partition", f"{origin} arrived changed")

    def checkpoint(self, partition: int) -> dict[str, Any]:
        """What a later run needs of what arrived on a partition: it expects what this one has not
        seen stray, because the partition where it did was not booked as far as that."""
        return {
            "arrived": [
                msgspec.to_builtins(one)
                for arrivals in self._arrived.values()
                for one in arrivals
                if one.seen and one.partition == partition and self._is_ahead(one)
            ]
        }

    def _is_ahead(self, one: Arrival) -> bool:
        where, _, offset = one.origin.rpartition("/")
        return int(offset) in self._ahead.get(where, ())


def _digest_of(record: Record) -> str:
    return xxh3_64_hexdigest(msgspec.msgpack.encode((record.key, record.value)))


class Letters:
    """The dead letters of a partition by the place of their records. `lost` are records whose
    letter, if there was one, has left its topic; `disputed` what else comes under the identities of
    conflicts."""

    def __init__(self, view: View, ledger: Ledger, moves: Moves) -> None:
        self._view = view
        self._report = view.report
        self._ledger = ledger
        self._moves = moves
        self.by_place: dict[Place, list[Record]] = {}
        self.disputed: dict[tuple[str, str], list[Event]] = {}
        self.lost: set[Place] = set()

    def read(self) -> None:
        """Read all letters, and count them by reason."""
        for topic in topics.SOURCES:
            for record in self._view.records(topics.dead_letters_of(topic)):
                headers = dict(record.headers)
                place = (
                    topic,
                    int(headers["credits-dlq-partition"]),
                    int(headers["credits-dlq-offset"]),
                )
                self.by_place.setdefault(place, []).append(record)
                reason = headers["credits-dlq-reason"].decode()
                if reason == "conflict":
                    event = understand(record, topic)
                    if not isinstance(event, str):
                        self.disputed.setdefault((event.source, event.id), [])
                counts = self._report.dead_letters
                counts[reason] = counts.get(reason, 0) + 1

    def reasons(self, place: Place) -> set[str]:
        """Why a record was refused; none when it was not."""
        return {
            dict(letter.headers)["credits-dlq-reason"].decode()
            for letter in self.by_place.get(place, ())
        }

    def bytes_kept(self, record: Record, place: Place) -> None:
        """The letter of a record, if there is one, has its bytes."""
        letters = self.by_place.get(place, [])
        if len(letters) > 1:
            self._report.violate("at_least_once", f"{len(letters)} dead letters of {place}")
        if not letters:
            since = self._view.complete_since(topics.dead_letters_of(place[0]))
            if written_at(record) < since:
                self.lost.add(place)
        for letter in letters:
            # A record that is replayed bears the number of its attempts, which its letter has anew.
            kept, sent = (
                {header for header in one.headers if "credits-dlq-" not in header[0]}
                for one in (letter, record)
            )
            if (letter.key, letter.value, kept) != (record.key, record.value, sent):
                self._report.violate(
                    "at_least_once", f"the dead letter of {place} is not its bytes"
                )

    def must_be_letter(self, record: Record, topic: str, why: str) -> None:
        """What holds no event, and why, is a dead letter, unless it strayed."""
        place = (topic, record.partition, record.offset)
        self.bytes_kept(record, place)
        reasons = self.reasons(place)
        if self._view.strayed(record):
            if topic == topics.COMMAND:
                # Its answer is awaited where its key belongs, so it is never moved.
                if reasons != {"wrong_partition"}:
                    self._report.violate(
                        "at_least_once", f"{place} strayed, and no dead letter says so"
                    )
            elif not reasons:
                self._moves.expect(topic, record)
            return
        allowed = {
            "malformed": {"malformed_json", "schema_violation"},
            "key": {"key_mismatch", "malformed_json", "schema_violation"},
        }[why]
        if not reasons & allowed:
            self.unrefused(place, f"{place} is no event ({why}), and no dead letter says so")
        if place in self._ledger.entries:
            self._report.violate("at_most_once", f"{place} is no event, but was booked")

    def unrefused(self, place: Place, what: str) -> None:
        """A record has come to nothing, and is no dead letter as far as those are left."""
        if place in self.lost:
            self._report.unknown("at_least_once", f"dead letters of {place[0]} are no longer there")
        else:
            self._report.violate("at_least_once", what)


class Refusals:
    """Whether what was refused had to be. `corrections` are those that were, and when."""

    def __init__(
        self, view: View, letters: Letters, tenants: Tenants, requests: Requests, tariffs: Tariffs
    ) -> None:
        self._view = view
        self._report = view.report
        self._letters = letters
        self._tenants = tenants
        self._requests = requests
        self._tariffs = tariffs
        self.corrections: list[tuple[Event, datetime]] = []

    def judge(self, record: Record, event: Event, reasons: Set[str]) -> None:
        """Whether a dead letter's reason is one this record can have."""
        for reason in reasons:
            try:
                right = self._right(record, event, reason)
            except (KeyError, TypeError, ValueError):
                right = None  # it has not what it is said to be refused for, as far as we see
            if right is None:
                self._report.unknown(
                    "at_least_once",
                    f"{event.place} is a dead letter for {reason}; the topics cannot tell whether "
                    "it had to be",
                )
            elif not right:
                self._report.violate(
                    "at_least_once", f"{event.place} is a dead letter for {reason}, wrongly"
                )

    def _right(self, record: Record, event: Event, reason: str) -> bool | None:
        """Whether a record had to be refused for a reason; None where nothing says it."""
        letter = dict(self._letters.by_place[event.place][0].headers)
        failed_at = datetime.fromisoformat(letter["credits-dlq-failed-at"].decode())
        topic, body = event.place[0], event.body
        right: bool | None = None
        if reason not in _REASONS[topic] or reason == "malformed_json":
            right = False
        elif self._view.strayed(record) and reason != "wrong_partition":
            right = False  # it is for its own partition to judge
        elif reason == "schema_violation":
            right = not is_sound(record, event) or self._lacks(event, failed_at)
        elif reason == "key_mismatch":
            right = not is_sound(record, event)
        elif reason == "wrong_partition":
            right = home(event.tenant.encode(), self._view.partitions) != event.place[1]
        elif reason == "conflict":
            right = True  # judged when everything is read
        elif reason == "unknown_tenant":
            # Opened later, perhaps.
            right = self._tenants.known_since.get(event.tenant, failed_at) >= failed_at
        elif reason == "currency_mismatch":
            money = body if topic in topics.USAGE else body.get("amount") or {}
            named = money.get("currency")
            right = named is not None and self._tenants.currencies.get(event.tenant) != named
        elif reason == "too_late":
            within = _RESULT_WITHIN if topic == topics.RESULT else _USAGE_WITHIN
            right = event.at < failed_at - within
        elif reason == "from_the_future":
            right = event.at > failed_at + _FUTURE
        elif reason == "overflow":
            near = self._tenants.peaks.get(event.tenant, 0) + _MOST_MOVED > _MOST_BALANCE
            right = True if near else None
        elif reason == "unrated":
            right = self._tariffs.can_be_unrated(event)
        elif reason == "not_billable":
            since = self._tenants.opened.get(event.tenant)
            closed = self._tenants.closed.get(event.tenant)
            open_then = since is not None and since <= event.started
            right = not open_then or (closed is not None and event.started >= closed)
        elif reason == "refused":
            right = body.get("phase") == "correction"
            self.corrections.append((event, failed_at))
        return right

    def _lacks(self, event: Event, failed_at: datetime) -> bool | None:
        """Whether a record of the right shape says too little or too much to be booked."""
        body = event.body
        if event.place[0] in topics.USAGE:
            seconds = 0 if body.get("phase") == "start" else -1
            if event.duration_s is not None:
                seconds = event.duration_s
            return seconds < 0 or kind_of(body) not in KINDS
        if event.place[0] == topics.COMMAND or body["status"] not in OF_RESULT:
            return False
        if body.get("amount"):
            return not 0 < nanos(body["amount"]["amount"]) <= _MOST_MOVED
        # Without an amount it is that of the request, as long as that is remembered.
        asked = self._requests.of_tenant.get(event.tenant, {}).get(body["recharge_id"])
        if body["status"] != "succeeded" or asked is None:
            return True
        fresh = failed_at - utc(asked["requested_at"]) < timedelta(days=1)
        return None if fresh else True

    def judge_conflicts(self, *known: Container[int]) -> None:
        """Who is refused for a conflict contradicts something that came under its identity;
        `known` are identities of before."""
        for identity, events in self._letters.disputed.items():
            refused = [
                one
                for one in events
                if "conflict" in self._letters.reasons(one.place) and self._view.wanted(one.tenant)
            ]
            others = [one for one in events if not self._letters.reasons(one.place)]
            for one in refused:
                if any(other.says() != one.says() for other in others):
                    continue
                if not others and any(number_of(identity) in one for one in known):
                    continue  # an earlier audit has read it
                trimmed = any(self._view.log.gone(topic) for topic in topics.SOURCES)
                if self._view.options.checkpoint_from is not None or trimmed:
                    self._report.unknown(
                        "at_least_once", "what conflicts contradict is no longer there"
                    )
                else:
                    self._report.violate(
                        "at_least_once", f"{one.place} is a dead letter for conflict, wrongly"
                    )
