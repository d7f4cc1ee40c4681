"""Causes: every entry names a record that is there, and is of a kind that the record can book."""

from collections.abc import Sequence
from datetime import timedelta
from fractions import Fraction
from typing import Final

from schemas import topics
from streams.testbed.auditor.events import Event, understand
from streams.testbed.auditor.ledger import OF_RESULT, Entry, Ledger
from streams.testbed.auditor.view import View, cause_of, decided_at

# What a record of each kind can book.
_OF_TICK: Final = {"expiry", "grant"}
_OF_USAGE: Final = {"charge", "pool", "expiry_reopened"}
_CLOCKS_DIFFER: Final = timedelta(minutes=5)
_OF_CORRECTION: Final = {*_OF_USAGE, "reversal", "void", "expiry", "grant"}


class Causes:
    """The records that the entries of a partition name."""

    def __init__(self, view: View, ledger: Ledger) -> None:
        self._view = view
        self._report = view.report
        self._ledger = ledger

    def judge(self) -> None:
        """Every entry has its record."""
        for place, of_place in self._ledger.entries.items():
            for entry in of_place:
                if place[0] == "tick":
                    if entry.kind not in _OF_TICK or (entry.amount < 0) != (entry.kind == "expiry"):
                        self._uncaused(
                            entry,
                            f"is {entry.kind} of {Fraction(entry.amount, 10**9)}, which time "
                            "cannot bring",
                        )
                elif place[0] not in topics.SOURCES:
                    self._uncaused(entry, f"is caused by {place[0]}, which is no source")
        wanted = {
            place: entries
            for place, entries in self._ledger.entries.items()
            if place[0] != "tick" and self._view.below(place)
        }
        for topic in topics.SOURCES:
            start = self._view.log.starts.get(topic, 0)
            trimmed = [place for place in wanted if place[0] == topic and place[2] < start]
            if trimmed:
                for invariant in ("cause", "at_least_once"):
                    self._report.unknown(
                        invariant,
                        f"{self._view.where(topic)} begins at offset {start}; "
                        f"{len(trimmed)} entries name records before it",
                    )
            for record in self._view.records(topic):
                entries = wanted.get((topic, record.partition, record.offset))
                if not entries:
                    continue
                event = understand(record, topic)
                for entry in entries:
                    if isinstance(event, str) or (
                        (event.tenant, event.source, event.id) != (entry.tenant, *entry.identity)
                    ):
                        self._report.violate(
                            "cause", f"{entry.tenant}/{entry.seq} names a record that is not its"
                        )
                if not isinstance(event, str) and topic != topics.COMMAND:
                    self._caused(event, entries)
                wanted.pop((topic, record.partition, record.offset))
            for place in trimmed:
                wanted.pop(place, None)
        # A checkpoint that does not say what arrived is of when an audit went beyond its position.
        if self._view.earlier is None or "arrived" in self._view.earlier:
            for place, entries in wanted.items():
                first = entries[0]
                self._report.violate(
                    "cause", f"{first.tenant}/{first.seq} names {place}, which is not there"
                )
        self._judge_later()

    def _judge_later(self) -> None:
        """What a later audit judges comes of something: of a record that is there, or of time."""
        there = {
            topic: {record.offset for record in self._view.later(topic)} for topic in topics.SOURCES
        }
        log = self._view.log
        for topic in sorted(self._view.names.keys() - set(topics.SOURCES)):
            for record in self._view.later(topic):
                self._report.count("later outputs")
                where = f"{self._view.where(topic)}/{record.offset}"
                place = cause_of(topic, record)
                if place is None:
                    at = decided_at(topic, record)
                    if log.read_at is not None and at > log.read_at + _CLOCKS_DIFFER:
                        self._report.unknown("cause", f"{where} is of {at}, which is not yet")
                elif place[0] not in log.hidden and (
                    place[1] != log.partition or place[2] not in there[place[0]]
                ):
                    self._report.violate("cause", f"{where} names {place}, which is not there")

    def _caused(self, event: Event, entries: Sequence[Entry]) -> None:
        """What usage or a result has booked is of a kind that it can book. How much is judged with
        prices, corrections and payments."""
        body = event.body
        if event.place[0] == topics.RESULT:
            kinds = OF_RESULT.get(str(body.get("status")), set())
            booked = [one for one in entries if one.kind in kinds]
            if len(booked) > 1:
                self._uncaused(booked[1], f"is booked after {booked[0].name} by the same result")
            for one in booked:
                if one.payment != body.get("payment_id"):
                    self._uncaused(one, f"is of the payment {one.payment}, not of its result's")
            kinds = {*kinds, "expiry_reopened"}
        elif body.get("phase") == "correction":
            kinds = _OF_CORRECTION
            # What a lot cannot keep goes again; no more than has come back.
            back = sum(one.amount for one in entries if one.kind == "reversal")
            gone = [one for one in entries if one.kind in ("void", "grant")]
            if any(one.amount > 0 for one in gone) or back < -sum(one.amount for one in gone):
                self._uncaused(gone[0], "moves more than the correction has brought back")
        else:
            kinds = _OF_USAGE
        for one in entries:
            if one.kind not in kinds:
                self._uncaused(one, f"is {one.kind}, which a record of {one.place[0]} cannot book")

    def _uncaused(self, entry: Entry, what: str) -> None:
        self._report.violate("cause", f"{entry.name} {what}")
