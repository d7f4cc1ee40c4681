"""A small set of correct books, written by hand: neither core nor engine had a part in it."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from schemas import topics
from streams.testbed.auditor import settled
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.calls import name_of
from streams.testbed.auditor.policies import Policy
from streams.testbed.auditor.prices import Deck
from streams.testbed.auditor.records import Log, Record
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import Options

TENANT = "contoso"
EXPOSURE_AT = 26
UNSET: dict[int, Any] = {
    settled.CLOSED: None, settled.VERSION: 0, settled.FLOOR: 0, settled.METHODS: [],
    settled.POLICY: [0, False, 0, "lt", "fixed", 0, 0, None, None, None, None, None, 3, 900, []],
    settled.DECKS: [], settled.LEVELS: [50, 20], settled.LICENCES: [],
}  # fmt: skip
AT = "2026-03-02T10:00:00Z"
DECK = Deck(
    b"Destination Name,Destination Type,Country,Prefix,Price / min\nLondon,landline,GB,4420,0.60\n"
)
NAMES = {topic.name: topic.name for topic in topics.MANIFEST}
NAMESPACE = uuid.UUID("6f1b2f3e-2f57-5a0c-9a5e-0d1c6f5b7a11")
RECHARGE = str(uuid.uuid5(NAMESPACE, f"{TENANT}/1/1"))


def record(
    topic: str, offset: int, value: Any, key: bytes | None = TENANT.encode(), **headers: str
) -> Record:
    raw = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    named = tuple((name.replace("_", "-"), text.encode()) for name, text in headers.items())
    return Record(topic, 0, offset, 0, key, raw, named)


def usage(event_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "source": "pbx",
        "tenant_id": TENANT,
        "kind": "international",
        "call_id": "c",
        "callee": "+442079460018",
        "started_at": AT,
        "duration_s": 60,
    } | changes


class Books:
    """One tenant: opened with 100, one call of 0.60, a recharge of 50; a repeat, a free call and a
    broken record beside them. Change what you like, then `audited`."""

    deck = DECK

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = [
            self.entry(1, "grant", "100", "100", (topics.COMMAND, 0, "cli", "open")),
            self.charge(2, 0, "e1", "-0.6", "99.4"),
            self.entry(
                3, "recharge", "50", "149.4", (topics.RESULT, 0, "pay", "r1"),
                recharge_id=RECHARGE, payment_id="p1",
            ),
        ]  # fmt: skip
        self.records: dict[str, list[Record]] = {
            topics.COMMAND: [
                record(
                    topics.COMMAND, 0,
                    {"command": "open_tenant", "command_id": "open", "source": "cli",
                     "currency": "USD", "billing_from": "2026-01-01T00:00:00Z",
                     "opening_balance": "100"},
                )
            ],
            topics.NOTIFICATION: [
                record(
                    topics.NOTIFICATION, 0, {"notice": "command_applied", "command_id": "open"}
                ),
            ],
            topics.CALL_USAGE: [
                record(topics.CALL_USAGE, 0, usage("e1")),
                record(topics.CALL_USAGE, 1, usage("e1")),
                record(topics.CALL_USAGE, 2, b"{broken"),
                record(topics.CALL_USAGE, 3, usage("e2", kind="free")),
            ],
            topics.dead_letters_of(topics.CALL_USAGE): [self.letter(2, b"{broken")],
            topics.REQUESTED: [record(topics.REQUESTED, 0, self.request(1, 1, RECHARGE))],
            topics.RESULT: [record(topics.RESULT, 0, self.result("r1"))],
        }  # fmt: skip
        self.tell("recharge_requested", recharge_id=RECHARGE)
        self.next = {topics.COMMAND: 1, topics.CALL_USAGE: 4, topics.RESULT: 1}
        self.starts: dict[str, int] = {}
        self.row_changes: dict[int, Any] = {}
        self.public_changes: dict[str, Any] = {}
        self.position_changes: dict[str, Any] = {}
        # What rows say of what commands have set, where they do not say it rightly.
        self.set: dict[int, Any] = {}
        # Of open calls, by leg: nanos, seconds until each dies, whether it has ended.
        self.holds: dict[str, tuple[int, int, bool]] = {}
        self.exposure: tuple[int, int] = (0, 0)
        self.tamper: Callable[[list[bytes]], list[bytes]] = lambda values: values

    @staticmethod
    def entry(
        seq: int, kind: str, amount: str, after: str, cause: tuple[str, int, str, str], **more: Any
    ) -> dict[str, Any]:
        topic, offset, source, name = cause
        return {
            "tenant_id": TENANT,
            "seq": seq,
            "kind": kind,
            "amount": amount,
            "currency": "USD",
            "balance_after": after,
            "at": AT,
            "booked_at": AT,
            "caused_by": {
                "topic": topic, "partition": 0, "offset": offset, "source": source, "id": name,
            },
            **more,
        }  # fmt: skip

    def charge(self, seq: int, offset: int, name: str, amount: str, after: str) -> dict[str, Any]:
        rate = {"version": self.deck.version, "prefix": "4420", "duration_s": 60}
        cause = (topics.CALL_USAGE, offset, "pbx", name)
        return self.entry(seq, "charge", amount, after, cause, rate=rate)

    @staticmethod
    def letter(
        offset: int, value: bytes, reason: str = "malformed_json", failed_at: str = AT
    ) -> Record:
        return record(
            topics.dead_letters_of(topics.CALL_USAGE), 0, value,
            credits_dlq_partition="0", credits_dlq_offset=str(offset), credits_dlq_reason=reason,
            credits_dlq_path="$", credits_dlq_failed_at=failed_at,
        )  # fmt: skip

    @staticmethod
    def request(epoch: int, attempt: int, recharge_id: str, **changes: Any) -> dict[str, Any]:
        return {
            "recharge_id": recharge_id, "tenant_id": TENANT, "epoch": epoch, "attempt": attempt,
            "amount": "50", "requested_at": AT, "expires_at": AT, "caused_by": "pbx/e1",
        } | changes  # fmt: skip

    def tell(self, notice: str, **said: Any) -> None:
        """One notice more."""
        told = self.records[topics.NOTIFICATION]
        body = {"notice": notice, "tenant_id": TENANT, "at": AT} | said
        told.append(record(topics.NOTIFICATION, len(told), body))

    def command(
        self, word: str, *entries: dict[str, Any], answer: str = "command_applied", **asked: Any
    ) -> None:
        """One command more with its answer, and what it has booked; the lot of all has it."""
        commands = self.records[topics.COMMAND]
        body = {"command": word, "command_id": "a1", "source": "cli", "issued_at": AT} | asked
        commands.append(record(topics.COMMAND, len(commands), body))
        self.next[topics.COMMAND] = len(commands)
        self.tell(answer, command_id=body["command_id"])
        self.entries += entries

    @staticmethod
    def result(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "result_id": name, "source": "pay", "recharge_id": RECHARGE, "payment_id": "p1",
            "status": "succeeded", "amount": {"amount": "50", "currency": "USD"},
            "occurred_at": AT,
        } | changes  # fmt: skip

    def ledger(self) -> tuple[list[bytes], bytes]:
        """The entries as bytes, chained, and the chain's head."""
        head = bytes(32)
        values = []
        left = Fraction(0)
        for entry in self.entries:
            # One lot for all, unless an entry names its own.
            left += Fraction(entry["amount"])
            one_lot = [{"id": "g1", "amount": entry["amount"], "left": f"{float(left):.9f}"}]
            entry = {"grants": one_lot} | entry
            body = json.dumps(entry, separators=(",", ":")).encode()[:-1]
            head = sha256(head + body).digest()
            values.append(body + b',"hash":"' + head.hex().encode() + b'"}')
        return self.tamper(values), head

    def hold(self, **legs: tuple[int, int, bool]) -> None:
        """Hold something for calls that were told of."""
        for name, held in legs.items():
            told = self.records[topics.CALL_USAGE]
            event = usage(f"{name}-start", phase="start", leg_id=name, duration_s=None)
            told.append(record(topics.CALL_USAGE, len(told), event))
            self.next[topics.CALL_USAGE] = len(told)
            self.holds[name_of("pbx", event)] = held

    def _applied(self) -> Iterator[tuple[dict[str, Any], datetime]]:
        """Every command that was applied, once, and from when on it counts."""
        notices = [json.loads(one.value or b"") for one in self.records[topics.NOTIFICATION]]
        at = {
            one["command_id"]: one.get("at", AT)
            for one in notices
            if one["notice"] == "command_applied"
        }
        for one in self.records[topics.COMMAND][: self.next[topics.COMMAND]]:
            with suppress(ValueError):
                body = json.loads(one.value or b"")
                applied_at = at.pop(body.get("command_id"), None)
                if applied_at is not None:
                    yield body, datetime.fromisoformat(body.get("effective_from") or applied_at)

    def commanded(self) -> dict[int, Any]:
        """What applied commands have set, by the place where rows keep it."""
        version, closed = 0, None
        policy, methods = UNSET[settled.POLICY], UNSET[settled.METHODS]
        decks: list[Any] = []
        licences: dict[tuple[str, str | None], list[int]] = {}
        for body, since in self._applied():
            match body["command"]:
                case "settings":
                    version += 1
                    methods = body.get("payment_methods", methods)
                    if body.get("policy") is not None:
                        policy = [policy[0] + 1, *Policy(body["policy"], since).in_row()]
                case "licences":
                    counts = licences.setdefault((body["capability"], body.get("country")), [])
                    counts += [round(since.timestamp()) * 1_000_000, body["count"]]
                case "tariff_assignment":
                    decks.append([body["deck"], since])
                case "open_tenant" | "close_tenant" as word:
                    closed = since if word == "close_tenant" else None
        plans = [[plan, country, counts, []] for (plan, country), counts in licences.items()]
        return UNSET | {
            settled.CLOSED: closed, settled.VERSION: version, settled.POLICY: policy,
            settled.METHODS: methods, settled.DECKS: decks, settled.LICENCES: plans,
        }  # fmt: skip

    def hold_rows(self) -> dict[bytes, bytes]:
        """The rows of open calls."""
        rows = {}
        for leg, (nanos, lives_s, ended) in self.holds.items():
            dies = datetime.fromisoformat(AT) + timedelta(seconds=lives_s)
            due = int(dies.timestamp()) * 1_000_000
            packed = msgspec.msgpack.encode([1, nanos, 0, dies, ended])
            rows[f"{TENANT}\0hold\0{leg}".encode()] = due.to_bytes(8, "big") + packed
        return rows

    def log(self) -> Log:
        values, head = self.ledger()
        last = self.entries[-1]
        left = round(float(last["balance_after"]) * 10**9)
        at = datetime(2026, 3, 2, tzinfo=UTC)
        row: list[Any] = [
            1, TENANT, "USD", last["seq"], head, 0,
            [["g1", "paid", 100, left, left, at, None, at]],
        ]  # fmt: skip
        for place, changed in self.row_changes.items():
            row[place] = changed
        row += [None] * (EXPOSURE_AT - len(row)) + [*self.exposure, False]
        for place, said in (self.commanded() | self.set).items():
            row[place] = said
        key, value = TENANT.encode(), b"\xff" * 8 + msgspec.msgpack.encode(row)
        rows = {key: value, **self.hold_rows()}
        position = {
            "version": 1,
            "now": max(AT, *(entry["booked_at"] for entry in self.entries)),
            "sources": {topic: {"next": offset} for topic, offset in self.next.items()},
            "rows": len(rows),
            "digest": f"{sum(xxh3_64_intdigest(k + v) for k, v in rows.items()) % 2**64:016x}",
            "exposures": {"USD": str(self.exposure[0])},
            "holds": self.exposure[1],
            "balances": {"USD": [str(max(0, left)), str(min(0, left))]},
            "tenants": {},
            "seen_next": 1,
        } | self.position_changes
        public = {
            "tenant_id": TENANT,
            "balance": last["balance_after"],
            "seq": last["seq"],
            "hash": head.hex(),
        } | self.public_changes
        return Log(
            partition=0,
            rows={**rows, b"\0position": json.dumps(position).encode()},
            records={
                **self.records,
                topics.LEDGER: [
                    record(topics.LEDGER, offset, value) for offset, value in enumerate(values)
                ],
                topics.BALANCE: [record(topics.BALANCE, 0, public)],
            },
            starts=self.starts,
        )

    def audited(self, partitions: int = 1, options: Options | None = None) -> Report:
        report, _ = audit(
            [self.log()], names=NAMES, partitions=partitions, deck=self.deck, options=options
        )
        return report

    def checkpoint(self) -> Any:
        """What an audit hands on to the next."""
        _, reached = audit([self.log()], names=NAMES, partitions=1, deck=self.deck)
        return json.loads(json.dumps(reached))

    def audited_from(self, begun: Mapping[str, int], earlier: Any) -> tuple[Report, Any]:
        """An audit that goes on at these offsets, where an earlier one has ended, and what it
        hands on; of other topics there is nothing new."""
        log = self.log()
        log.begun = dict(begun)
        for topic, records in log.records.items():
            log.records[topic] = [one for one in records if one.offset >= begun.get(topic, 99)]
        options = Options(checkpoint_from=Path("earlier"))
        report, reached = audit(
            [log], names=NAMES, partitions=1, deck=self.deck, options=options, earlier=earlier
        )
        return report, json.loads(json.dumps(reached))


# What audits keep of commands and calls; those of before did not.
KEPT = ("decided", "settled", "kept_since", "open_calls")


def of_before(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint one that was written before audits said what they had not seen."""
    for known in checkpoint.values():
        for member in ("recharges", "since", "asked", "by_hand", *KEPT):
            known.pop(member, None)


def violated(report: Report) -> set[str]:
    return {name for name, finding in report.findings.items() if finding.violations}
