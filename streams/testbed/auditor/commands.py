"""Commands: the one answer of each, what it has booked, and the lots that grants have asked for."""

import hashlib
from collections.abc import Mapping, Set
from datetime import datetime
from fractions import Fraction
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.events import FORGOTTEN, REMEMBERED, Event, number_of
from streams.testbed.auditor.ledger import Entry, Ledger
from streams.testbed.auditor.payments import Payments
from streams.testbed.auditor.recharges import Recharges
from streams.testbed.auditor.records import EVER, PLAIN, nanos, utc
from streams.testbed.auditor.requests import Requests
from streams.testbed.auditor.settled import Settled
from streams.testbed.auditor.sources import Sources
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import View

_OF_COMMAND: Final[Mapping[str, Set[str]]] = {
    "open_tenant": {"grant"},
    "book_payment": {"purchase"},
    "adjustment": {"adjustment"},
    "grant": {"grant"},
    "void": {"void"},
    "resolve_recharge": {"recharge", "purchase"},
}
_OF_PAYMENTS: Final = {"book_payment", "resolve_recharge"}


class Asked(Struct, gc=False):
    """What commands say of a lot by the name it gets: how much, from when until when, whether it
    comes again, how often it was asked for and how often it came. Not `known` is a lot whose
    command has left its topic, not `dated` one whose end nothing says."""

    amount: int = 0
    again: bool = False
    since: datetime | None = None
    ends: datetime | None = None
    dated: bool = True
    known: bool = True
    times: int = 0
    came: int = 0


class Grants:
    """Lots by tenant and name: what commands have asked for, held against what came."""

    def __init__(self, view: View, ledger: Ledger) -> None:
        self._view = view
        self._report = view.report
        self._ledger = ledger
        self._asked: dict[tuple[str, str], Asked] = {
            (tenant, made): msgspec.convert(one, Asked)
            for tenant, made, one in view.remembered("asked")
        }

    def note(self, event: Event, answered_at: datetime | None) -> None:
        """Remember what a grant that was not refused asks for."""
        body = event.body
        since = utc(body["effective_at"]) if body.get("effective_at") else None
        ends, dated = None, True
        if body.get("expires_at"):
            ends = utc(body["expires_at"])
        elif body.get("kind") == "paid":
            # Bought money lasts for a year.
            dated = answered_at is not None
            ends = None if answered_at is None else _a_year_later(max(since or EVER, answered_at))
        earlier = self._asked.get((event.tenant, _lot_of(event)), Asked())
        self._asked[event.tenant, _lot_of(event)] = Asked(
            nanos(body["amount"]["amount"]),
            bool(body.get("every_days") or body.get("every_months")),
            since,
            ends,
            dated,
            times=earlier.times + 1,
            came=earlier.came,
        )

    def judge(self) -> None:
        """Lots came as they were asked for: with their amount, not before their time, to their
        end, and once unless they come again."""
        granted: dict[tuple[str, str], list[Entry]] = {}
        for entry in self._ledger:
            if entry.kind == "grant" and entry.amount > 0 and entry.lots:
                granted.setdefault((entry.tenant, entry.lots[-1]), []).append(entry)
        for (tenant, made), entries in granted.items():
            asked = self._asked.get((tenant, made))
            if asked is None:
                by_time = [one for one in entries if one.place[0] == "tick"]
                if by_time and self._view.complete(topics.COMMAND):
                    self._report.violate(
                        "cause", f"{by_time[0].name} puts in {made}, which nobody asked for"
                    )
                elif by_time:
                    self._report.unknown("cause", "the commands that gave lots are no longer there")
                    # The next audit judges what comes.
                    self._asked[tenant, made] = Asked(known=False)
                continue
            asked.came += len(entries)
            if not asked.known:
                continue
            if any(
                one.amount > asked.amount or (not asked.again and one.amount != asked.amount)
                for one in entries
            ):
                self._bad_lot(tenant, f"was granted another amount as {made} than asked for")
            if asked.since is not None and any(one.at < asked.since for one in entries):
                self._bad_lot(tenant, f"was granted {made} before its time")
            if asked.dated and any(one.ends != asked.ends for one in entries):
                self._bad_lot(tenant, f"was granted {made} to another end than asked for")
            if not asked.again and asked.came > asked.times:
                self._bad_lot(tenant, f"was granted {made} {asked.came} times")

    def _bad_lot(self, tenant: str, what: str) -> None:
        self._report.violate("lots", f"{tenant} {what}")

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {"asked": [[*lot, msgspec.to_builtins(asked)] for lot, asked in self._asked.items()]}


class Commands:
    """The commands of a partition. `decided` is when, by the number of each; of those that earlier
    audits have read too."""

    def __init__(
        self,
        view: View,
        sources: Sources,
        ledger: Ledger,
        *,
        tenants: Tenants,
        grants: Grants,
        settled: Settled,
        requests: Requests,
        payments: Payments,
        recharges: Recharges,
    ) -> None:
        self._view = view
        self._report = view.report
        self._sources = sources
        self._ledger = ledger
        self._tenants = tenants
        self._grants = grants
        self._settled = settled
        self._requests = requests
        self._payments = payments
        self._recharges = recharges
        self.decided: dict[int, datetime] = {
            number: utc(at) for number, at in view.remembered("decided")
        }
        # The answers by the offset of the command, and what was answered when to those that do
        # not say it.
        self._answered: dict[int, tuple[str, datetime | None]] = {}
        self._unplaced: dict[tuple[str, str], list[tuple[str, datetime | None]]] = {}

    def _notices(self) -> dict[tuple[str, str], int]:
        """Read what was told, the answers to commands among it; how many of these there are by
        tenant and command."""
        counts: dict[tuple[str, str], int] = {}
        for record in self._view.records(topics.NOTIFICATION):
            self._view.judge_home(record, "notice")
            tenant, notice = (record.key or b"").decode(), PLAIN.decode(record.value or b"")
            if self._view.wanted(tenant):
                self._recharges.notice(tenant, notice, record.offset)
            if not notice["notice"].startswith("command_"):
                continue
            key = (tenant, notice["command_id"])
            counts[key] = counts.get(key, 0) + 1
            at = utc(notice["at"]) if notice.get("at") else None
            answer = (notice["notice"], at)
            # Its id says to which record it is the answer: tenant/topic/partition/offset/number.
            place = dict(record.headers).get("ce_id", b"").decode().split("/")
            if place[1:3] == [topics.COMMAND, str(self._view.log.partition)] and len(place) == 5:
                self._answered[int(place[3])] = answer
            else:
                self._unplaced.setdefault(key, []).append(answer)
        return counts

    def _answer_to(self, event: Event) -> tuple[str, datetime | None]:
        """What was answered to a command, and when; nothing where there is no answer yet."""
        if event.place[2] not in self._answered:
            answers = self._unplaced.get((event.tenant, event.id))
            if not answers:
                return "", None
            self._answered[event.place[2]] = answers.pop(0)
        return self._answered[event.place[2]]

    def judge(self) -> None:
        """Read all commands and their answers; what they have booked is what they ask for."""
        found = self._notices()
        expected: dict[tuple[str, str], tuple[int, int]] = {}
        for record, event in self._sources.events(topics.COMMAND):
            self._report.count("commands")
            reasons = self._sources.letters.reasons(event.place)
            self._sources.refusals.judge(record, event, reasons)
            if reasons - {"conflict"}:
                continue
            least, most = expected.get((event.tenant, event.id), (0, 0))
            self._sources.letters.bytes_kept(record, event.place)
            answered = event.place not in self._sources.letters.lost
            expected[event.tenant, event.id] = (least + answered, most + 1)
            answer, answered_at = self._answer_to(event)
            self._commanded(event, answer, answered_at)
            if "conflict" in reasons:  # refused for the one whose id it took, and nothing else
                continue
            self._tenants.note(event, answered_at)
            if answer:
                self._decide(event, answer, answered_at)
            if answer == "command_applied":
                if event.body.get("command") == "open_tenant" and answered_at is not None:
                    self._tenants.note_opening(event.tenant, answered_at)
                self._tenants.note_applied(event, answered_at or EVER)
                if event.body.get("command") == "approve":
                    self._recharges.approve(event.tenant, answered_at or EVER)
                if event.body.get("command") == "resolve_recharge":
                    # A person's word is an answer too.
                    self._requests.answer(event.body["recharge_id"], "resolved")
            if event.body.get("command") == "grant" and answer in ("command_applied", ""):
                self._grants.note(event, answered_at)
        for (tenant, command_id), (least, most) in expected.items():
            answers = found.get((tenant, command_id), 0)
            if not least <= answers <= most:
                self._report.violate(
                    "answered",
                    f"command {command_id} of {tenant}: {least} asked, {answers} answers",
                )

    def _decide(self, event: Event, answer: str, at: datetime | None) -> None:
        """A command is decided once, for as long as its id is remembered; what comes under that
        later is a repeat of it, and nothing else is one."""
        number = number_of((event.source, event.id))
        first = self.decided.get(number)
        if answer == "command_repeated":
            since = self._view.known_since(topics.COMMAND, topics.NOTIFICATION)
            if first is None and at is not None and at - FORGOTTEN >= since:
                self._report.violate(
                    "answered", f"{event.id} of {event.tenant} is no repeat, and was taken for one"
                )
            return
        if first is not None and at is not None and at - first < REMEMBERED:
            self._report.violate(
                "at_most_once", f"command {event.id} of {event.tenant} was decided twice"
            )
        if at is not None:
            self.decided[number] = at
        if answer == "command_applied":
            self._settled.note(event)

    def _commanded(self, event: Event, answer: str, answered_at: datetime | None) -> None:
        """What a command has booked is what it asks for, once, and nothing unless it was
        applied."""
        body, entries = event.body, self._ledger.entries.get(event.place, [])
        if answer != "command_applied":
            # Without an answer nobody can say; that is a fault of its own.
            if answer and entries:
                self._uncaused(entries[0], "has booked though the command was not applied")
            return
        word = str(body.get("command"))
        asked: int | None = None
        least = most = 0
        if word in ("adjustment", "book_payment") or (
            word == "resolve_recharge" and body.get("paid")
        ):
            asked, least, most = nanos(body["amount"]["amount"]), 1, 1
        elif word == "open_tenant":
            asked = nanos(body.get("opening_balance") or "0")
            least = most = int(asked != 0)
        elif word == "grant":
            # How much of which lot: see `Grants`. What begins later is put in by a tick.
            since = utc(body["effective_at"]) if body.get("effective_at") else None
            least = int(since is None or (answered_at is not None and since <= answered_at))
            most = int(since is None or answered_at is None or since <= answered_at)
        elif word == "void":
            most = 1
        if body.get("payment_id") and asked is not None:
            # Refunds and disputes of it come as results, and so may its success.
            self._payments.by_hand[event.tenant, body["payment_id"]] = asked
        kinds = _OF_COMMAND.get(word, set())
        booked = [one for one in entries if one.kind in kinds]
        for one in entries:
            if one.kind not in kinds and one.kind != "expiry_reopened":
                self._uncaused(one, f"is {one.kind}, which {word} cannot book")
        if not least <= len(booked) <= most:
            self._report.violate(
                "cause", f"{event.id} of {event.tenant} ({word}) was booked {len(booked)} times"
            )
        money = body.get("amount") if word in _OF_COMMAND or word == "fund" else None
        if isinstance(money, dict) and self._tenants.differs(event.tenant, money.get("currency")):
            self._report.violate("cause", f"{event.id} of {event.tenant} is in another currency")
        for one in booked:
            if asked is not None and one.amount != asked:
                self._uncaused(one, f"is not the {Fraction(asked, 10**9)} that were asked for")
            named = body.get("payment_id") if word in _OF_PAYMENTS else None
            if one.payment != named:
                self._uncaused(one, f"is of the payment {one.payment}, not of {named}")
            if word == "void" and (one.amount > 0 or one.lots != (body["grant_id"],)):
                self._uncaused(one, f"takes {one.lots}, not {body['grant_id']}")
            if word == "grant" and (one.amount <= 0 or one.lots[-1:] != (_lot_of(event),)):
                self._report.violate(
                    "lots", f"{one.name} puts in {one.lots[-1:]}, not {_lot_of(event)}"
                )
            until = body.get("expires_at") if word == "adjustment" and one.amount > 0 else None
            if until is not None and one.ends != utc(until):
                self._uncaused(one, f"ends at {one.ends}, not at {until}")

    def _uncaused(self, entry: Entry, what: str) -> None:
        self._report.violate("cause", f"{entry.name} {what}")

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        now = self._view.now
        return {
            "decided": [
                [number, at.isoformat()]
                for number, at in self.decided.items()
                if now is None or at + FORGOTTEN > now
            ]
        }


def _lot_of(event: Event) -> str:
    """The name of the lot that a grant makes."""
    return "c" + hashlib.sha256(f"{event.source}\0{event.id}".encode()).hexdigest()[:12]


def _a_year_later(at: datetime) -> datetime:
    try:
        return at.replace(year=at.year + 1)
    except ValueError:
        return at.replace(year=at.year + 1, day=28)
