"""What is known of tenants, by their rows, commands and entries."""

from datetime import datetime
from typing import Any

import msgspec

from streams.testbed.auditor.events import Event
from streams.testbed.auditor.minutes import Licence
from streams.testbed.auditor.records import EVER, utc
from streams.testbed.auditor.view import View


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
        self.assigned = {
            tenant: set(decks) for tenant, decks in view.remembered("assigned", {}).items()
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
            self.assigned.setdefault(event.tenant, set()).add(str(body.get("deck")))

    def note_opening(self, tenant: str, at: datetime) -> None:
        """A tenant was opened, then or before."""
        self.known_since[tenant] = min(self.known_since.get(tenant, at), at)

    def note_licences(self, event: Event, at: datetime) -> None:
        """A command that was applied at an instant."""
        body = event.body
        if body.get("command") == "open_tenant":
            self.zones.setdefault(event.tenant, str(body.get("time_zone") or "UTC"))
        elif body.get("command") == "licences":
            since = utc(body["effective_from"]) if body.get("effective_from") else at
            country = str(body.get("country") or "")
            self.licences.setdefault(event.tenant, []).append(
                Licence(body["capability"], country, body["count"], since, at)
            )

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "assigned": {one: sorted(decks) for one, decks in self.assigned.items()},
            "zones": self.zones,
            "licences": {
                tenant: [msgspec.to_builtins(one) for one in known]
                for tenant, known in self.licences.items()
            },
        }
