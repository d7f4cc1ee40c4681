"""Corrections: what was wrong is reversed once, by what it had cost, and linked both ways."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from typing import Any

import msgspec
from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.events import FORGOTTEN, REMEMBERED, Event, number_of
from streams.testbed.auditor.ledger import CHARGES, Entry, Ledger
from streams.testbed.auditor.letters import Refusals
from streams.testbed.auditor.minutes import Line, lines_of
from streams.testbed.auditor.usage import Usage
from streams.testbed.auditor.view import View


class Charge(Struct, gc=False):
    """A charge that may be corrected, of money or of included minutes alone: the number of its
    event's identity, and the entry that has reversed it. `minutes` are pool, month and count."""

    tenant: str
    seq: int
    number: int
    amount: int
    at: datetime
    booked_at: datetime
    taken: int | None = None
    minutes: list[Line] = []


class Corrections:
    """The corrections of a partition. `charges` are all that may be corrected, by tenant and number
    of the entry."""

    def __init__(self, view: View, ledger: Ledger, usage: Usage, refusals: Refusals) -> None:
        self._view = view
        self._report = view.report
        self._ledger = ledger
        self._usage = usage
        self._refusals = refusals
        known = [msgspec.convert(one, Charge) for one in view.remembered("charges")]
        self.charges = {(one.tenant, one.seq): one for one in known}

    def judge(self) -> None:
        """Every correction has reversed what it corrects."""
        booked = list(self._ledger)
        for one in booked:
            if one.kind in CHARGES:
                number = number_of(one.identity)
                self.charges[one.tenant, one.seq] = Charge(
                    one.tenant,
                    one.seq,
                    number,
                    one.amount,
                    one.at,
                    one.booked_at,
                    minutes=lines_of(one.pools),
                )
        of_event: dict[tuple[str, int], list[Charge]] = {}
        for charge in self.charges.values():
            of_event.setdefault((charge.tenant, charge.number), []).append(charge)
        for back in booked:
            if back.kind == "reversal":
                self._report.count("reversals")
                self._one_reversal(back)
        corrected_by: dict[tuple[str, str], tuple[str, str]] = {}
        for identity, events in self._usage.corrections.items():
            caused = [one for one in events if self._ledger.entries.get(one.place)]
            named = events[0].corrected
            if named is None:
                self._wrong(f"{events[0].place} corrects nothing, and is no dead letter")
                continue
            had_cost = of_event.get((events[0].tenant, number_of(named)), [])
            if not caused:
                if any(charge.taken is None for charge in had_cost):
                    self._report.violate(
                        "at_least_once", f"{events[0].place} has neither reversed nor been refused"
                    )
                continue
            first = corrected_by.setdefault(named, identity)
            if first != identity:
                self._wrong(f"{named[1]} is corrected by {first[1]} and by {identity[1]}")
            if not had_cost and number_of(named) not in self._usage.met:
                if any(self._view.log.starts.get(topic) for topic in topics.SOURCES):
                    self._report.unknown("correction", "what was corrected is gone from its topic")
                else:
                    self._wrong(f"{identity[1]} corrects {named[1]}, which was never booked")
            for event in caused:
                self._one_correction(event, had_cost)
        self._refused_rightly(of_event)

    def _one_reversal(self, back: Entry) -> None:
        name = f"{back.tenant}/{back.seq}"
        if back.place[0] not in topics.USAGE or back.links.get("entry") is None:
            self._wrong(f"{name} reverses, but does not say what")
            return
        seq = int(back.links["entry"])
        charge = self.charges.get((back.tenant, seq))
        if charge is None:
            if seq <= self._ledger.head(back.tenant).seq:
                self._report.unknown("correction", "entries of before the checkpoint were reversed")
            else:
                self._wrong(f"{name} reverses entry {seq}, which is no charge")
            return
        if charge.taken is not None:
            self._wrong(f"{name} reverses entry {seq}, as {charge.taken} did before")
        charge.taken = back.seq
        if charge.amount != -back.amount:
            self._wrong(
                f"{name} gives {Fraction(back.amount, 10**9)} back for a charge of "
                f"{Fraction(-charge.amount, 10**9)}"
            )
        if charge.number != number_of((back.identity[0], str(back.links.get("corrects")))):
            self._wrong(f"{name} reverses entry {seq}, but names another event")
        if charge.seq >= back.seq:
            self._wrong(f"{name} reverses an entry that came after it")

    def _one_correction(self, event: Event, had_cost: Sequence[Charge]) -> None:
        """The entries of one correction: a reversal for each charge there was, and the new one
        says in whose place it stands."""
        entries = self._ledger.entries[event.place]
        corrects = event.body["corrects"]
        numbers = {one.seq for one in entries if one.kind == "reversal"}
        for charge in had_cost:
            if charge.seq < entries[0].seq and charge.taken not in numbers:
                self._wrong(f"{event.place} has not reversed {charge.tenant}/{charge.seq}")
        reversed_seqs = [one.links.get("entry") for one in entries if one.kind == "reversal"]
        for entry in entries:
            name = f"{entry.tenant}/{entry.seq}"
            if entry.kind in ("reversal", *CHARGES) and entry.links.get("corrects") != corrects:
                self._wrong(f"{name} does not say that it corrects {corrects}")
            last = reversed_seqs[-1] if reversed_seqs else None
            if entry.kind in CHARGES and entry.links.get("entry") != last:
                self._wrong(f"{name} does not say in place of which entry it stands")

    def _refused_rightly(self, of_event: Mapping[tuple[str, int], Sequence[Charge]]) -> None:
        """No correction is refused of what is on the books, remembered and never reversed."""
        for event, failed_at in self._refusals.corrections:
            if event.corrected is None:
                continue
            for charge in of_event.get((event.tenant, number_of(event.corrected)), ()):
                remembered = failed_at - REMEMBERED <= charge.at
                if charge.booked_at < failed_at and remembered and charge.taken is None:
                    self._report.violate(
                        "at_least_once",
                        f"{event.place} is a dead letter, but {charge.tenant}/{charge.seq} could "
                        "have been reversed",
                    )

    def _wrong(self, text: str) -> None:
        self._report.violate("correction", text)

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        last = max((one.booked_at for one in self.charges.values()), default=None)
        return {
            "charges": [
                msgspec.to_builtins(one)
                for one in self.charges.values()
                if last is not None and one.at >= last - FORGOTTEN
            ],
        }
