"""Pools: what included minutes have paid by the ledger, and what they had to."""

from typing import Any

from schemas import topics
from streams.testbed.auditor.corrections import Corrections
from streams.testbed.auditor.ledger import Ledger
from streams.testbed.auditor.minutes import Booked, Coverage, Reckoning
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.usage import Usage
from streams.testbed.auditor.view import View


class Pools:
    """The included minutes of a partition's tenants."""

    def __init__(
        self,
        view: View,
        ledger: Ledger,
        tenants: Tenants,
        usage: Usage,
        corrections: Corrections,
        coverage: Coverage,
    ) -> None:
        self._view = view
        self._report = view.report
        self._ledger = ledger
        self._tenants = tenants
        self._usage = usage
        self._corrections = corrections
        self._coverage = coverage
        self._used: dict[str, dict[tuple[str, str], int]] = {}
        for tenant, pool, month, minutes in view.remembered("used"):
            self._used.setdefault(tenant, {})[pool, month] = minutes

    def judge(self) -> None:
        """Included minutes, tenant by tenant, in the order of the ledger."""
        of_tenant: dict[str, list[Booked]] = {}
        for place, entries in self._ledger.entries.items():
            for one in entries:
                undone = self._corrections.charges.get((one.tenant, one.links.get("entry", 0)))
                back = undone.minutes if one.kind == "reversal" and undone is not None else []
                if one.tenant in self._tenants.licences or one.pools or back:
                    of_tenant.setdefault(one.tenant, []).append(
                        Booked(
                            one.seq,
                            one.kind,
                            one.amount,
                            one.booked_at,
                            one.pools,
                            self._usage.calls.get(place),
                            None if undone is None else back,
                        )
                    )
        for tenant, booked in of_tenant.items():
            complete = self._view.complete(topics.COMMAND)
            if not complete and self._view.earlier is None:
                self._report.unknown("pools", "the commands that gave licences are no longer there")
            reckoning = Reckoning(
                self._coverage,
                self._tenants.zones.get(tenant, "UTC"),
                self._tenants.licences.get(tenant, []),
                self._used.get(tenant),
            )
            for fault in reckoning.judge(booked, complete=complete):
                self._report.violate("pools", f"{tenant}/{fault}")
            self._used[tenant] = reckoning.used
            self._report.count("included minutes", sum(reckoning.used.values()))

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "used": [
                [tenant, *bucket, minutes]
                for tenant, used in self._used.items()
                for bucket, minutes in used.items()
            ]
        }
