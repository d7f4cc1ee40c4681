"""Recharge requests: one id for each epoch and attempt, and one unanswered at a time."""

import uuid
from itertools import pairwise
from typing import Any, Final

from schemas import topics
from streams.testbed.auditor.ledger import judge_available
from streams.testbed.auditor.records import PLAIN, utc
from streams.testbed.auditor.view import View

_RECHARGES: Final = uuid.UUID("6f1b2f3e-2f57-5a0c-9a5e-0d1c6f5b7a11")


class Requests:
    """The requests of a partition by tenant and id, without what changes when they are asked again,
    and `answers`: the statuses that answer each."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._report = view.report
        self.of_tenant: dict[str, dict[str, dict[str, Any]]] = {
            tenant: dict(known) for tenant, known in view.remembered("requests", {}).items()
        }
        self.answers: dict[str, set[str]] = {
            one: set(said) for one, said in view.remembered("answers", {}).items()
        }

    def answer(self, recharge_id: str, status: str) -> None:
        """A request was answered."""
        self.answers.setdefault(recharge_id, set()).add(status)

    def judge(self) -> None:
        """Read all requests; their ids are derived, and asked again they are the same."""
        for record in self._view.records(topics.REQUESTED):
            request = PLAIN.decode(record.value or b"")
            tenant = request["tenant_id"]
            if not self._view.wanted(tenant):
                continue
            self._report.count("requests")
            self._view.judge_home(record, f"request {request['recharge_id']}")
            judge_available(self._report, f"request {request['recharge_id']}", request)
            known = self.of_tenant.setdefault(tenant, {})
            request.pop("expires_at")
            first = known.setdefault(request["recharge_id"], request)
            if first != request:
                self._report.violate(
                    "one_request",
                    f"{request['recharge_id']} of {tenant} was published again, but changed",
                )
        for tenant, of_tenant in self.of_tenant.items():
            attempts: dict[tuple[int, int], str] = {}
            for request in of_tenant.values():
                if request["epoch"] is None:
                    continue
                attempt = (request["epoch"], request["attempt"])
                derived = str(uuid.uuid5(_RECHARGES, f"{tenant}/{attempt[0]}/{attempt[1]}"))
                if attempts.setdefault(attempt, request["recharge_id"]) != request["recharge_id"]:
                    self._report.violate(
                        "one_request", f"{tenant} has two ids for epoch, attempt {attempt}"
                    )
                if derived != request["recharge_id"]:
                    self._report.violate(
                        "one_request", f"{request['recharge_id']} of {tenant} is not derived"
                    )

    def judge_answers(self) -> None:
        """A request goes out when the one before it is answered."""
        since = self._view.complete_since(topics.RESULT)
        for tenant, of_tenant in self.of_tenant.items():
            auto = [one for one in of_tenant.values() if one["epoch"] is not None]
            auto.sort(key=lambda one: (one["epoch"], one["attempt"]))
            for earlier, later in pairwise(auto):
                if self.answers.get(earlier["recharge_id"]):
                    continue
                if utc(earlier["requested_at"]) < since:
                    self._report.unknown(
                        "one_request", f"answers to requests of {tenant} are no longer there"
                    )
                    self.answer(earlier["recharge_id"], "gone")
                else:
                    self._report.violate(
                        "one_request",
                        f"{tenant} was asked for {later['recharge_id']} while "
                        f"{earlier['recharge_id']} had no answer",
                    )

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "requests": self.of_tenant,
            "answers": {one: sorted(said) for one, said in self.answers.items()},
        }
