"""Usage: every event is booked once, at its price, or is a dead letter, or a repeat."""

from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from schemas import topics
from streams.testbed.auditor.calls import OpenCalls
from streams.testbed.auditor.events import Event, Met, kind_by, number_of
from streams.testbed.auditor.guards import Spent
from streams.testbed.auditor.ledger import CHARGES, Entry, Ledger
from streams.testbed.auditor.minutes import Call
from streams.testbed.auditor.prices import Deck, Tariffs
from streams.testbed.auditor.recharges import Recharges
from streams.testbed.auditor.records import EVER, Place, Record, nanos
from streams.testbed.auditor.shapes import is_amount
from streams.testbed.auditor.sources import Sources
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import View


class Usage:
    """The usage of a partition. `met` are the identities of what was booked, in earlier audits
    too; `corrections`, by identity, those that were neither refused nor strayed; `calls` those that
    included minutes may have paid."""

    def __init__(
        self,
        view: View,
        sources: Sources,
        ledger: Ledger,
        tenants: Tenants,
        tariffs: Tariffs,
        recharges: Recharges,
        calls: OpenCalls,
    ) -> None:
        self._view = view
        self._report = view.report
        self._sources = sources
        self._ledger = ledger
        self._tenants = tenants
        self._tariffs = tariffs
        self._recharges = recharges
        self._open_calls = calls
        self.met = Met(view.remembered("ids", {}))
        self.corrections: dict[tuple[str, str], list[Event]] = {}
        self.calls: dict[Place, Call] = {}

    def judge(self) -> None:
        """Read all usage, and hold it against the entries."""
        booked: dict[tuple[str, str], tuple[Any, ...]] = {}
        unbooked: dict[tuple[str, str], Event] = {}
        charged: dict[tuple[str, str], list[datetime]] = {}
        for topic in topics.USAGE:
            for record, event in self._sources.events(topic):
                self._report.count("events")
                self._one_usage(record, event, booked, unbooked, charged)
        for identity, event in unbooked.items():
            if identity in booked or number_of(identity) in self.met:
                continue
            self._sources.letters.unrefused(
                event.place,
                f"{event.id} of {event.tenant} at {event.place} was neither booked nor refused",
            )
        for identity, times in charged.items():
            if len(times) > 1:
                text = f"{identity[1]} was charged {len(times)} times"
                self._report.violate("at_most_once", text)
        now = self._view.now or EVER
        for identity in booked:
            self.met.add(number_of(identity), charged.get(identity, [now])[-1])
        self._report.count("distinct_ids", len(booked))

    def _one_usage(
        self,
        record: Record,
        event: Event,
        booked: dict[tuple[str, str], tuple[Any, ...]],
        unbooked: dict[tuple[str, str], Event],
        charged: dict[tuple[str, str], list[datetime]],
    ) -> None:
        identity = (event.source, event.id)
        entries = self._ledger.entries.get(event.place, [])
        self._sources.letters.bytes_kept(record, event.place)
        reasons = self._sources.letters.reasons(event.place)
        if reasons:
            if entries:
                self._report.violate(
                    "at_least_once", f"{event.place} is booked and a dead letter as well"
                )
            self._sources.refusals.judge(record, event, reasons)
            return
        if self._view.strayed(record):
            self._sources.moves.expect(event.place[0], record)
            if entries:
                self._report.violate("partition", f"{event.place} was booked where it strayed")
            return
        number = number_of(identity)
        self._open_calls.note(record, event, again=number in self.met or identity in booked)
        if event.body.get("phase") == "correction":
            self.corrections.setdefault(identity, []).append(event)
        charges = [entry for entry in entries if entry.kind in CHARGES]
        if len(charges) > 1:
            self._report.violate("at_most_once", f"{event.place} has {len(charges)} charges")
        minutes = charges[0].minutes if charges else 0
        cost = self._tariffs.cost(event, charges[0].deck if charges else None, minutes)
        deck = self._tariffs.of(charges[0].deck) if charges else None
        if deck is not None:
            self._tariffs.judge_version(event, deck, charges[0].booked_at)
            self._note_call(event, deck)
            self._note_risk(event, deck, charges[0])
        if self._tariffs.foreign is not None:
            # Priced by a deck that is not at hand: what this one says proves nothing.
            self._report.unknown(
                "at_least_once", f"the deck {self._tariffs.foreign} is not at hand"
            )
            cost = -charges[0].amount if charges else 0
        if cost is None:
            if charges:
                self._report.violate("price", f"{event.place} cannot be priced, but was charged")
            else:
                self._sources.letters.unrefused(
                    event.place, f"{event.place} cannot be booked, and no dead letter says so"
                )
            return
        if charges:
            charged.setdefault(identity, []).append(charges[0].booked_at)
            if self.met.within(number, charges[0].booked_at):
                self._report.violate("at_most_once", f"{event.id} was charged before as well")
            if charges[0].amount != -cost:
                self._report.violate(
                    "price",
                    f"{event.place} costs {Fraction(cost, 10**9)}, charged "
                    f"{Fraction(-charges[0].amount, 10**9)}",
                )
            booked[identity] = event.says()
            self._cross_check(event, -charges[0].amount)
            return
        earlier = booked.get(identity)
        if earlier is not None and earlier != event.says():
            self._sources.letters.unrefused(
                event.place, f"{event.place} contradicts an event with its id, unreported"
            )
        elif not cost:
            booked.setdefault(identity, event.says())
        else:
            unbooked[identity] = event

    def _cross_check(self, event: Event, charged: int) -> None:
        told = event.body.get("upstream_charge")
        if told is None or event.body.get("phase") == "correction":
            return
        if not is_amount(told):
            text = f"{event.place} was booked, and its upstream_charge is no amount"
            self._report.violate("at_least_once", text)
            return
        currency = event.body.get("currency") or self._tenants.currencies.get(event.tenant, "")
        self._report.cross_check(currency, nanos(told), charged)

    def _note_call(self, event: Event, deck: Deck) -> None:
        if event.tenant not in self._tenants.licences:
            return
        row = deck.at(str(event.body.get("callee") or "")[1:], event.started)
        if row is not None and event.duration_s is not None:
            self.calls[event.place] = Call(
                kind_by(event.body, row) or "",
                event.body.get("capability"),
                event.body.get("user_country"),
                event.started,
                event.duration_s,
                row,
            )

    def _note_risk(self, event: Event, deck: Deck, charge: Entry) -> None:
        if not deck.has_risks or charge.kind != "charge":
            return
        row = deck.at(str(event.body.get("callee") or "")[1:], event.started)
        risk = (row or {}).get("Risk class")
        if risk:
            at = charge.booked_at.astimezone(UTC)
            self._recharges.spend(event.tenant, Spent(at, -charge.amount, risk, charge.seq))

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {"ids": self.met.checkpoint(self._view.now or EVER)}
