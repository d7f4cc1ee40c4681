"""Payments: what results and commands say of each, and what is booked of it."""

from fractions import Fraction
from typing import Any, Final

from schemas import topics
from streams.testbed.auditor.events import Met, number_of
from streams.testbed.auditor.ledger import CREDITS, OF_RESULT, Ledger
from streams.testbed.auditor.records import EVER, nanos
from streams.testbed.auditor.requests import Requests
from streams.testbed.auditor.sources import Sources
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import View

# Statuses that answer a request.
_TERMINAL: Final = {"succeeded", "declined", "cancelled", "expired"}
# What is booked of a payment, the status that says it, and its sign.
_SAID_AS: Final = (
    ("credit", "succeeded", 1),
    ("refund", "refunded", -1),
    ("dispute", "dispute_opened", -1),
)


class Payments:
    """The payments of a partition by tenant and name: what results say by status, what commands
    have booked `by_hand`, and what is booked. `settled` are those that an earlier audit has seen,
    `gone` those that cannot be reckoned: what was asked for, or answered, has left its topic."""

    def __init__(
        self, view: View, sources: Sources, ledger: Ledger, tenants: Tenants, requests: Requests
    ) -> None:
        self._view = view
        self._report = view.report
        self._sources = sources
        self._ledger = ledger
        self._tenants = tenants
        self._requests = requests
        self.paid: dict[tuple[str, ...], dict[str, int]] = {
            tuple(key.split("\0")): said for key, said in view.remembered("paid", {}).items()
        }
        self.booked: dict[tuple[str, str, str], int] = {
            (tenant, payment, group): int(amount)
            for tenant, payment, group, amount in view.remembered("booked")
        }
        self.settled = {(key[0], key[1]) for key in (*self.paid, *self.booked)}
        # A checkpoint that does not say what was booked by hand: what no result had said.
        unsaid = [
            (tenant, payment, amount)
            for (tenant, payment, group), amount in self.booked.items()
            if group == "credit" and (tenant, payment) not in self.paid
        ]
        self.by_hand: dict[tuple[str, str], int] = {
            (tenant, payment): amount
            for tenant, payment, amount in view.remembered("by_hand", unsaid)
        }
        self.gone: set[tuple[str, str]] = set()
        # Results that were not refused, in earlier audits too.
        self.met = Met(view.remembered("result_ids", {}))

    def judge(self) -> None:
        """Read all results; what they say of payments is what is booked."""
        for entry in self._ledger:
            if entry.payment is not None and self._view.below(entry.place):
                group = (entry.tenant, entry.payment, _group_of(entry.kind))
                self.booked[group] = self.booked.get(group, 0) + entry.amount
        for record, event in self._sources.events(topics.RESULT):
            self._report.count("results")
            self._sources.letters.bytes_kept(record, event.place)
            reasons = self._sources.letters.reasons(event.place)
            if reasons:
                self._sources.refusals.judge(record, event, reasons)
                continue
            if self._view.strayed(record):
                self._sources.moves.expect(topics.RESULT, record)
                continue
            self.met.add(number_of((event.source, event.id)), self._view.now or EVER)
            body = event.body
            if body["status"] in _TERMINAL:
                self._requests.answer(body["recharge_id"], body["status"])
            if event.place in self._sources.letters.lost and body["status"] in OF_RESULT:
                if event.place not in self._ledger.entries:
                    self.gone.add((event.tenant, body["payment_id"]))
                    continue
            amount = 0
            if body.get("amount"):
                amount = nanos(body["amount"]["amount"])
                currency = body["amount"]["currency"]
                if body["status"] in OF_RESULT and self._tenants.differs(event.tenant, currency):
                    self._report.violate(
                        "credit_once", f"{event.place} is in {currency}, and was not refused"
                    )
            elif body["status"] == "succeeded":
                asked = self._requests.of_tenant.get(event.tenant, {}).get(body["recharge_id"])
                if asked is None and not self._view.complete(topics.REQUESTED):
                    self.gone.add((event.tenant, body["payment_id"]))
                amount = nanos(asked["amount"]) if asked else 0
            key = (event.tenant, body["payment_id"])
            of_payment = self.paid.setdefault(key, {})
            if not body.get("amount") and str(body["status"]).startswith("dispute_"):
                # All of what was paid.
                amount = self._paid(key)
            of_payment[body["status"]] = max(of_payment.get(body["status"], 0), amount)
        self._compare()

    def _paid(self, key: tuple[str, str]) -> int:
        """How much of a payment has come, by what results or commands say."""
        return max(self.paid[key].get("succeeded", 0), self.by_hand.get(key, 0))

    def _compare(self) -> None:
        of_results = [
            (entry.tenant, entry.payment, place[2])
            for place, entries in self._ledger.entries.items()
            if place[0] == topics.RESULT and self._view.below(place)
            for entry in entries
            if entry.payment is not None
        ]
        from_results = {(tenant, payment) for tenant, payment, _ in of_results}
        left = self._view.log.gone(topics.RESULT)
        answered = {(tenant, payment) for tenant, payment, offset in of_results if offset in left}
        for topic, of_topic in ((topics.REQUESTED, self.gone), (topics.RESULT, answered)):
            if of_topic:
                self._report.unknown(
                    "credit_once",
                    f"{self._view.where(topic)} begins at offset "
                    f"{self._view.log.starts.get(topic, 0)}; {len(of_topic)} payments are known "
                    "in part",
                )
        gone = self.gone | answered
        unsaid = {key: booked for key, booked in self.booked.items() if key[:2] not in gone}
        for (tenant, payment), said in self.paid.items():
            if (tenant, payment) in gone:
                continue
            refunded = said.get("refunded", 0)
            open_still = said.get("dispute_opened", 0) - said.get("dispute_won", 0)
            held = max(0, open_still, said.get("dispute_lost", 0))
            for group, wanted in (
                ("credit", self._paid((tenant, payment))),
                ("refund", -refunded),
                ("dispute", -held),
            ):
                booked = unsaid.pop((tenant, payment, group), 0)
                if booked != wanted:
                    self._report.violate(
                        "credit_once",
                        f"payment {payment} of {tenant}: {group} {Fraction(booked, 10**9)} booked, "
                        f"{Fraction(wanted, 10**9)} said",
                    )
        for tenant, payment in gone:
            # For the next audit what is booked counts as what was said: it judges what comes.
            self.paid[tenant, payment] = {
                status: sign * self.booked.get((tenant, payment, group), 0)
                for group, status, sign in _SAID_AS
            }
        for (tenant, payment, group), booked in unsaid.items():
            if booked and (tenant, payment) in from_results:
                self._report.violate(
                    "credit_once",
                    f"payment {payment} of {tenant}: {group} {Fraction(booked, 10**9)} booked, "
                    "but no result says so",
                )

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "by_hand": [[*key, amount] for key, amount in self.by_hand.items()],
            "paid": {"\0".join(key): said for key, said in self.paid.items()},
            "booked": [[*key, str(amount)] for key, amount in self.booked.items()],
            "result_ids": self.met.checkpoint(self._view.now or EVER),
        }


def _group_of(kind: str) -> str:
    if kind in CREDITS:
        return "credit"
    return "dispute" if kind.startswith("dispute") else kind
