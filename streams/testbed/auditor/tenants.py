"""What is known of tenants, by their rows, commands and entries."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from streams.testbed.auditor.events import Event
from streams.testbed.auditor.minutes import Licence
from streams.testbed.auditor.records import EVER, utc
from streams.testbed.auditor.view import View


class Assigned(Struct, frozen=True):
    """A deck for calls that start then or later, and when it was assigned; without instants, one
    that was asked for, and that nothing tells more of."""

    deck: str
    since: datetime | None = None
    at: datetime | None = None


class Tenants:
    """Currencies, times and assignments by tenant. `known_since` is when a tenant is known at the
    latest, `peaks` the most that it had or owed, `assigned` the decks it was given beside the
    common one."""

    def __init__(self, view: View) -> None:
        self.currencies: dict[str, str] = {}
        self.opened: dict[str, datetime] = {}
        self.closed: dict[str, datetime] = {}
        self.known_since = dict.fromkeys(view.remembered("tenants"), EVER)
        self.peaks: dict[str, int] = {}
        # Audits of before remembered no more than names.
        self.assigned: dict[str, list[Assigned]] = {
            tenant: [
                Assigned(one) if isinstance(one, str) else msgspec.convert(one, Assigned)
                for one in known
            ]
            for tenant, known in view.remembered("assigned", {}).items()
        }
        self.zones: dict[str, str] = dict(view.remembered("zones"))
        self.licences: dict[str, list[Licence]] = {
            tenant: [msgspec.convert(one, Licence) for one in known]
            for tenant, known in view.remembered("licences", {}).items()
        }

    def differs(self, tenant: str, currency: str | None) -> bool:
        """Whether something is in another currency than a tenant's account, as far as that is
        known."""
        return currency is not None and self.currencies.get(tenant, currency) != currency

    def note(self, event: Event, answered_at: datetime | None) -> None:
        """A command that was not refused, whatever was answered."""
        body = event.body
        if body.get("command") == "open_tenant":
            self.currencies.setdefault(event.tenant, str(body.get("currency")))
            if body.get("billing_from"):
                since = datetime.fromisoformat(body["billing_from"])
                self.opened[event.tenant] = max(since, self.opened.get(event.tenant, since))
        elif body.get("command") == "close_tenant":
            # While it is not answered, nothing says since when.
            at = answered_at or EVER
            self.closed[event.tenant] = min(at, self.closed.get(event.tenant, at))
        elif body.get("command") == "tariff_assignment":
            self._assign(event.tenant, Assigned(str(body.get("deck"))))

    def note_opening(self, tenant: str, at: datetime) -> None:
        """A tenant was opened, then or before."""
        self.known_since[tenant] = min(self.known_since.get(tenant, at), at)

    def _assign(self, tenant: str, one: Assigned) -> None:
        known = self.assigned.setdefault(tenant, [])
        if one.since is not None or one.deck not in self.names(tenant):
            known.append(one)

    def names(self, tenant: str) -> set[str]:
        """What the decks are called that may price a tenant's calls, as far as names tell."""
        return {"default", *(one.deck for one in self.assigned.get(tenant, ()))}

    def decks_of(self, tenant: str, started: datetime, booked_at: datetime) -> set[str]:
        """The decks that may price a call: by what was assigned before it was booked, and in the
        same instant before it or after."""
        assigned = self.assigned.get(tenant, ())
        known = [one for one in assigned if one.at is not None and one.at < booked_at]
        decks = {_deck_at(known, started)}
        for one in assigned:
            if one.at == booked_at:
                known.append(one)
                decks.add(_deck_at(known, started))
        return decks

    def note_applied(self, event: Event, at: datetime) -> None:
        """A command that was applied at an instant."""
        body = event.body
        since = utc(body["effective_from"]) if body.get("effective_from") else at
        if body.get("command") == "open_tenant":
            self.zones.setdefault(event.tenant, str(body.get("time_zone") or "UTC"))
        elif body.get("command") == "licences":
            country = str(body.get("country") or "")
            self.licences.setdefault(event.tenant, []).append(
                Licence(body["capability"], country, body["count"], since, at)
            )
        elif body.get("command") == "tariff_assignment":
            self._assign(event.tenant, Assigned(str(body.get("deck")), since, at))

    def believe_deck(self, tenant: str, one: Assigned) -> None:
        """A deck whose command is gone was assigned, unless that is known."""
        known = self.assigned.get(tenant, ())
        if all((each.deck, each.since) != (one.deck, one.since) for each in known):
            self._assign(tenant, one)

    def believe_licence(self, tenant: str, one: Licence) -> None:
        """Licences whose command is gone were given, unless that is known."""
        known = self.licences.setdefault(tenant, [])
        if all(msgspec.structs.replace(each, known_at=one.known_at) != one for each in known):
            known.append(one)

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "assigned": {
                tenant: [msgspec.to_builtins(one) for one in known]
                for tenant, known in self.assigned.items()
            },
            "zones": self.zones,
            "licences": {
                tenant: [msgspec.to_builtins(one) for one in known]
                for tenant, known in self.licences.items()
            },
        }


def _deck_at(assigned: Iterable[Assigned], started: datetime) -> str:
    begun = {
        one.since: one.deck for one in assigned if one.since is not None and one.since <= started
    }
    return begun[max(begun)] if begun else "default"
