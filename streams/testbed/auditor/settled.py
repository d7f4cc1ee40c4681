"""What commands have settled, held against rows: settings, licences, decks, open or closed.

The commands that were applied are folded in their order. What was refused, or half of it, or a
change that was lost or made twice, shows in the row.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct

from streams.testbed.auditor.events import Event
from streams.testbed.auditor.minutes import Licence
from streams.testbed.auditor.policies import VELOCITY
from streams.testbed.auditor.recharges import Recharges
from streams.testbed.auditor.records import EPOCH, EVER, nanos
from streams.testbed.auditor.rows import Rows
from streams.testbed.auditor.tenants import Assigned, Tenants
from streams.testbed.auditor.view import View

# Where a tenant's row keeps what commands set.
CLOSED: Final = 9
VERSION: Final = 11
FLOOR: Final = 12
POLICY: Final = 13
METHODS: Final = 14
DECKS: Final = 19
LEVELS: Final = 23
LICENCES: Final = 25
# Changes of so long ago may be forgotten: no call can start under them any more.
_KEPT: Final = timedelta(days=66)


class Settings(Struct):
    """What was commanded of a tenant: how often its settings and its policy changed, and the last
    words. None and nothing: what a tenant has that was only opened, or what an audit before did
    not say. So many of the policies are `believed`, whose commands are gone."""

    versions: int = 0
    policies: int = 0
    believed: int = 0
    methods: list[str] | None = None
    floor: str | None = None
    levels: list[int] | None = None
    closed: bool | None = None


class Settled:
    """What stands for the tenants of a partition by their commands. Policies are remembered by
    `recharges`, decks and licences by `tenants`."""

    def __init__(self, view: View, rows: Rows, tenants: Tenants, recharges: Recharges) -> None:
        self._view = view
        self._rows = rows
        self._tenants = tenants
        self._recharges = recharges
        self._settings: dict[str, Settings] = {
            tenant: msgspec.convert(said, Settings)
            for tenant, said in view.remembered("settled", {}).items()
        }

    def note(self, event: Event) -> None:
        """A command was applied."""
        one, body = self._settings.setdefault(event.tenant, Settings()), event.body
        word = body.get("command")
        if word in ("open_tenant", "close_tenant"):
            one.closed = word == "close_tenant"
        elif word == "settings":
            one.versions += 1
            one.policies += body.get("policy") is not None
            if body.get("payment_methods") is not None:
                one.methods = body["payment_methods"]
            if body.get("overdraft_floor") is not None:
                one.floor = body["overdraft_floor"]
            if body.get("alert_levels") is not None:
                one.levels = sorted(body["alert_levels"], reverse=True)

    def judge(self) -> None:
        """What is set for tenants is what was commanded. Where commands are gone, the next audit
        believes the rows, and judges what comes."""
        # A row of an earlier program could hold less.
        rows = {
            tenant: row
            for tenant, row in self._rows.of_tenant.items()
            if self._view.wanted(tenant) and len(row) > LICENCES
        }
        for tenant, row in rows.items():
            for text, of_all in self._differences(tenant, row):
                if of_all and not self._view.knows_commands:
                    self._view.report.unknown(
                        "settings", "the commands that set them are no longer there"
                    )
                else:
                    self._view.report.violate("settings", f"{tenant} {text}")
        if not self._view.knows_commands:
            for tenant, row in rows.items():
                self._believe(tenant, row)

    def _differences(self, tenant: str, row: Sequence[Any]) -> Iterator[tuple[str, bool]]:
        """What is wrong with a row, and whether that depends on knowing all commands."""
        one = self._settings.get(tenant, Settings())
        if (one.versions, one.policies) != (row[VERSION], row[POLICY][0]):
            text = f"had its settings changed {one.versions} times, its policy {one.policies}"
            yield f"{text}; by its row {row[VERSION]} and {row[POLICY][0]} times", True
            return
        if one.policies > one.believed:
            policy = self._recharges.policy(tenant, one.policies)
            found = list(row[POLICY][1 : VELOCITY + 1])
            if policy is None:
                self._view.report.unknown(
                    "settings",
                    f"no notice says which command set policy {one.policies} of {tenant}",
                )
            elif policy.in_row() != found:
                yield f"has the policy {found}, its last command says {policy.in_row()}", False
        for text in _last_words(one, row):
            yield text, False
        now = self._view.now or EVER
        for name, said, kept in self._histories(tenant, row):
            young = {at: what for at, what in said.items() if at + _KEPT >= now}
            forgotten = any(kept.get(at) != what for at, what in young.items())
            if forgotten or any(said.get(at) != what for at, what in kept.items()):
                yield f"has {name} {_told(kept)}, its commands say {_told(said)}", True

    def _histories(
        self, tenant: str, row: Sequence[Any]
    ) -> Iterator[tuple[str, dict[datetime, Any], dict[datetime, Any]]]:
        """What changes from which instant on: as commanded, and as the row has it."""
        assigned = self._tenants.assigned.get(tenant, ())
        said = {one.since: one.deck for one in assigned if one.since is not None}
        yield "decks", said, {at: deck for deck, at in row[DECKS]}
        found = _licences_in(row)
        licences: dict[tuple[str, str], dict[datetime, int]] = {}
        for one in self._tenants.licences.get(tenant, ()):
            licences.setdefault((one.plan, one.country), {})[one.since] = one.count
        for plan in sorted(licences.keys() | found.keys()):
            name = f"licences of {'/'.join(plan)}"
            yield name, licences.get(plan, {}), found.get(plan, {})

    def _believe(self, tenant: str, row: Sequence[Any]) -> None:
        """Take what a row has for commanded."""
        one = self._settings.setdefault(tenant, Settings())
        one.versions = row[VERSION]
        one.policies = one.believed = row[POLICY][0]
        for deck, at in row[DECKS]:
            self._tenants.believe_deck(tenant, Assigned(deck, at, EVER))
        for (plan, country), counts in _licences_in(row).items():
            for at, count in counts.items():
                self._tenants.believe_licence(tenant, Licence(plan, country, count, at, EVER))

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "settled": {tenant: msgspec.to_builtins(one) for tenant, one in self._settings.items()}
        }


def _last_words(one: Settings, row: Sequence[Any]) -> Iterator[str]:
    """Where the last command about something is known, that holds."""
    if one.closed is not None and one.closed != (row[CLOSED] is not None):
        yield f"is {'open' if one.closed else 'closed'}, its last command says otherwise"
    if one.methods is not None and list(row[METHODS]) != one.methods:
        yield f"has the payment methods {list(row[METHODS])}, its last command says {one.methods}"
    if one.floor is not None and row[FLOOR] != nanos(one.floor):
        yield f"has the overdraft floor {row[FLOOR]}, its last command says {one.floor}"
    if one.levels is not None and list(row[LEVELS]) != one.levels:
        yield f"has the alert levels {list(row[LEVELS])}, its last command says {one.levels}"


def _licences_in(row: Sequence[Any]) -> dict[tuple[str, str], dict[datetime, int]]:
    return {
        (plan, country or ""): {
            EPOCH + timedelta(microseconds=counts[at]): counts[at + 1]
            for at in range(0, len(counts), 2)
        }
        for plan, country, counts, _ in row[LICENCES]
    }


def _told(history: Mapping[datetime, Any]) -> str:
    return (
        ", ".join(f"{one} from {at.isoformat()}" for at, one in sorted(history.items())) or "none"
    )
