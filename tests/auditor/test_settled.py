"""What commands have set, as the auditor folds it, held against the rows of the core."""

import json
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest

from schemas import topics
from schemas.commands import (
    AnyCommand,
    CloseTenant,
    Licences,
    RechargePolicy,
    Settings,
    TariffAssignment,
)
from streams.billing import ledger
from streams.billing.account import Account, encode_row
from streams.billing.parts import AccountRow, Policy
from streams.coverage import load_coverage
from streams.testbed.auditor import policies, settled
from streams.testbed.auditor.events import Event
from streams.testbed.auditor.recharges import Recharges
from streams.testbed.auditor.records import Log
from streams.testbed.auditor.rows import Rows
from streams.testbed.auditor.settled import Settled
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import Options, View
from tests.auditor.books import NAMES, UNSET, Books, violated
from tests.billing.builders import NOW, a_command, opening, some_terms

TERMS = some_terms(coverage=load_coverage(None))
COMMON: dict[str, Any] = {"tenant_id": "t-1", "issued_at": NOW}
POLICY = RechargePolicy(
    enabled=True, trigger="60", amount="80.5", min_amount="70", monthly_cap="400",
    cooldown_s=5, max_per_day=9, velocity={"high": "12", "elevated": "40"},
)  # fmt: skip
COMMANDS: tuple[AnyCommand, ...] = (
    opening(opening_balance="20"),
    Settings(expected_version=0, policy=POLICY, payment_methods=["card-1", "card-2"], **COMMON),
    Settings(expected_version=1, alert_levels=[20, 75], overdraft_floor="3.5", **COMMON),
    Settings(expected_version=2, payment_methods=["card-2"], **COMMON),
    Licences(capability="MCOMEETADV", count=2, effective_from=NOW - timedelta(days=9), **COMMON),
    Licences(capability="MCOPSTN5", country="US", count=4, **COMMON),
    Licences(capability="MCOPSTN5", country="US", count=0, **COMMON),
    TariffAssignment(deck="partners", effective_from=NOW - timedelta(days=3), **COMMON),
    TariffAssignment(deck="default", **COMMON),
    CloseTenant(**COMMON),
)


class Seen:
    """What the auditor makes of commands, from the beginning or from a checkpoint on."""

    def __init__(self, earlier: dict[str, Any] | None = None) -> None:
        self.view = View(
            Report(), Log(partition=0, rows={}, records={}), names=NAMES, partitions=1,
            options=Options(), earlier=earlier,
        )  # fmt: skip
        self.view.position = {"now": (NOW + timedelta(minutes=1)).isoformat()}
        self.tenants = Tenants(self.view)
        self.rows = Rows(self.view, self.tenants)
        self.recharges = Recharges(
            until=self.view.now, since={}, trimmed=(), whole=earlier is None,
            earlier=self.view.remembered("recharges", None),
        )  # fmt: skip
        self.settled = Settled(self.view, self.rows, self.tenants, self.recharges)

    def applied(self, number: int, body: dict[str, Any], at: datetime) -> None:
        """A command was applied, and a new policy was told of."""
        place = (topics.COMMAND, 0, number)
        event = Event(place, "t-1", "cli", str(number), body)
        cause = f"cli/{number}"
        self.recharges.record(place, "t-1", cause, body, refused=False)
        if body.get("policy") is not None:
            told = {"notice": "settings_changed", "policy_version": 1, "caused_by": cause}
            self.recharges.notice("t-1", told | {"at": at.isoformat()})
        self.settled.note(event)
        self.tenants.note_applied(event, at)

    def checkpoint(self) -> dict[str, Any]:
        subjects = (self.view, self.tenants, self.settled)
        reached = {"recharges": self.recharges.checkpoint()}
        for subject in subjects:
            reached |= subject.checkpoint()
        found: dict[str, Any] = json.loads(json.dumps(reached))
        return found


def obeyed(*commands: AnyCommand) -> tuple[Seen, Account]:
    """What the auditor and the core make of the same commands."""
    account: Account | None = None
    seen = Seen()
    for number, command in enumerate(commands):
        at = NOW + timedelta(seconds=number)
        outcome = ledger.apply(account, a_command(command), TERMS, at)
        assert outcome.label == "applied", outcome.notices
        account = outcome.account
        body = msgspec.json.decode(msgspec.json.encode(command))
        seen.applied(number, {one: said for one, said in body.items() if said is not None}, at)
    assert account is not None
    return seen, account


def faults(seen: Seen, account: Account) -> list[str]:
    seen.rows.of_tenant["t-1"] = msgspec.msgpack.decode(encode_row(account)[8:])
    assert list(seen.recharges.judge({}, {}, {}, settled=set(), answered={})) == []
    seen.settled.judge()
    return seen.view.report.findings["settings"].shown


@pytest.mark.parametrize("count", range(1, len(COMMANDS) + 1))
def test_what_the_core_sets_is_what_the_auditor_has_folded(count: int) -> None:
    seen, account = obeyed(*COMMANDS[:count])
    assert faults(seen, account) == []
    assert faults(Seen(seen.checkpoint()), account) == []


@pytest.mark.parametrize("lost", range(1, len(COMMANDS)))
def test_every_command_that_has_no_effect_is_noticed(lost: int) -> None:
    seen, _ = obeyed(*COMMANDS[: lost + 1])
    _, before = obeyed(*COMMANDS[:lost])
    assert len(faults(seen, before)) == 1


@pytest.mark.parametrize(
    "half",
    [
        {"payment_methods": ("card-9",)},
        {"alert_levels": (20,)},
        {"overdraft_floor_nanos": 1},
        {"policy": Policy(version=1)},
        {"decks": ()},
        {"pools": ()},
        {"settings_version": 4},
        {"closed_at": NOW},
    ],
)
def test_whatever_no_command_says_is_noticed(half: dict[str, Any]) -> None:
    seen, account = obeyed(*COMMANDS[:-1])
    assert faults(seen, account.changed(**half)) != []


def test_members_stand_where_rows_have_them() -> None:
    row, policy = AccountRow.__struct_fields__, Policy.__struct_fields__
    places = {
        "closed_at": settled.CLOSED, "settings_version": settled.VERSION,
        "overdraft_floor_nanos": settled.FLOOR, "policy": settled.POLICY,
        "payment_methods": settled.METHODS, "decks": settled.DECKS,
        "alert_levels": settled.LEVELS, "pools": settled.LICENCES,
    }  # fmt: skip
    assert {name: row.index(name) for name in places} == places
    amounts = {name.removesuffix("_amount") + "_nanos": at for name, at in policies.AMOUNTS.items()}
    members = {**policies.PLAIN, **amounts, "velocity": policies.VELOCITY}
    members["version"] = 0
    assert members == {name: policy.index(name) for name in policy}


def test_a_change_that_a_row_does_not_show_turns_settings_red() -> None:
    books = Books()
    books.command("settings", expected_version=0, payment_methods=["card-1"])
    assert violated(books.audited()) == set()
    for place, said in ((settled.METHODS, ["card-2"]), (settled.VERSION, 2)):
        books.set = {place: said}
        assert violated(books.audited()) == {"settings"}


def test_a_policy_that_a_row_does_not_show_turns_settings_red() -> None:
    books = Books()
    books.command("settings", expected_version=0, policy={"enabled": True, "trigger": "60"})
    books.tell("settings_changed", caused_by="cli/a1", policy_version=1)
    report = books.audited()
    assert "settings" not in violated(report)
    assert not report.findings["settings"].unknown
    books.set = {settled.POLICY: [1, *UNSET[settled.POLICY][1:]]}
    assert "settings" in violated(books.audited())


def test_settings_whose_commands_are_gone_are_unknown() -> None:
    books = Books()
    books.set = {settled.VERSION: 3}
    books.starts = {topics.COMMAND: 1}
    del books.records[topics.COMMAND][0]
    found = books.audited().findings["settings"]
    assert found.unknown
    assert not found.violations


def test_an_audit_goes_on_from_what_an_earlier_one_has_seen_set() -> None:
    books = Books()
    books.command("settings", expected_version=0, payment_methods=["card-1"])
    earlier = books.checkpoint()
    begun = {topics.COMMAND: 2, topics.NOTIFICATION: 3, topics.CALL_USAGE: 4, topics.RESULT: 1}
    begun |= {topics.LEDGER: 3, topics.BALANCE: 0, topics.REQUESTED: 1}
    assert violated(books.audited_from(begun, earlier)[0]) == set()
    books.set = {settled.METHODS: ["card-2"]}
    assert violated(books.audited_from(begun, earlier)[0]) == {"settings"}
