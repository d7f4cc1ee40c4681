"""Pauses, back-offs and payment methods: what declines lead to, as far as the topics tell it.

The notices of a tenant are walked through in their order (see `standings`). Where money may have
moved recharges without a notice, or a command or result is gone, nothing is said of what depends on
it: an audit that does not see all of it is silent, and never wrong.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.policies import Policy
from streams.testbed.auditor.records import EVER, utc
from streams.testbed.auditor.standings import PAID, UNPAUSED, Command, Entry, Notice, Standing, Walk

_KINDS: Final = {
    *PAID,
    "command_applied",
    "settings_changed",
    "recharge_requested",
    "recharge_declined",
    "recharge_ended",
    "recharge_resolved",
    "recharge_paused",
    "recharge_withheld",
}
# Reasons that are given when the balance is not stale.
_NOT_STALE: Final = {"paused", *UNPAUSED}
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


class Success(Struct, frozen=True, gc=False):
    """A result that says that something was paid."""

    cause: str
    payment: str


class Pauses:
    """Where recharges stand for the tenants of a partition. Tell it what there is, then ask.

    `whole` says that no audit was there before, or `earlier` what it has said, of all until
    `judged`; `since` from when on each topic has everything; `until` is the instant of the
    position, and what was decided later is not judged.
    """

    def __init__(
        self,
        earlier: Mapping[str, Any],
        *,
        whole: bool,
        since: Mapping[str, datetime],
        judged: datetime,
        until: datetime,
    ) -> None:
        self._until = until
        begins = max(since.values(), default=EVER)
        gap = begins > judged
        self._knows = not gap and (whole or bool(earlier.get("knows_standings")))
        # Where a request is not found, it may have left its topic.
        self._complete = since.get(topics.REQUESTED, EVER) == EVER
        # Until then a result may have moved recharges without a word, and be gone.
        self._results_since = since.get(topics.RESULT, EVER)
        self._blank = begins if gap else until
        self._standings: dict[str, Standing] = {
            tenant: msgspec.convert(said, Standing)
            for tenant, said in (() if gap else earlier.get("standings", ()))
        }
        self._notices: dict[str, list[Notice]] = {}
        # None: under one name came two that say different things.
        self._commands: dict[tuple[str, str], Command | None] = {}
        self._codes: dict[tuple[str, str], set[str | None]] = {}
        self._successes: dict[str, list[Success]] = {}
        self._names: dict[tuple[str, str], set[str]] = {}
        # The notices of one transaction follow one another without a gap: the offset of the last
        # one, its instant, and whether a balance was stale in it, or was not.
        self._batch: tuple[int, datetime] | None = None
        self._stale: dict[bool, str] = {}
        self._torn: list[tuple[datetime, str]] = []

    # what there is

    def record(self, topic: str, tenant: str, cause: str, body: Mapping[str, Any]) -> None:
        """A command or a result that was not refused."""
        if topic == topics.COMMAND:
            word = str(body.get("command"))
            said = Command(word, body.get("payment_methods"), bool(body.get("paid")))
            if self._commands.setdefault((tenant, cause), said) != said:
                self._commands[tenant, cause] = None
            if word in ("book_payment", "resolve_recharge"):
                self._name(tenant, body)
        elif topic == topics.RESULT and body.get("status") == "declined":
            code = body.get("decline_code")
            code = None if code is None else str(code)
            self._codes.setdefault((tenant, cause), set()).add(code)
        elif topic == topics.RESULT and body.get("status") == "succeeded":
            payment = self._name(tenant, body)
            self._successes.setdefault(tenant, []).append(Success(cause, payment))

    def _name(self, tenant: str, body: Mapping[str, Any]) -> str:
        """Note of which request something says that a payment is; which payment."""
        payment = str(body.get("payment_id"))
        self._names.setdefault((tenant, payment), set()).add(str(body.get("recharge_id")))
        return payment

    def notice(self, tenant: str, said: Mapping[str, Any], offset: int | None) -> None:
        """A notice with its instant, in the order of the topic; `offset` is its place there."""
        at, kind = utc(said["at"]), said["notice"]
        if offset is not None:
            self._in_a_batch(tenant, said, at, offset)
        if kind in _KINDS:
            found = Notice(
                kind,
                at,
                str(said.get("caused_by")),
                said.get("recharge_id"),
                said.get("withheld") or said.get("rule"),
                said.get("decline_code"),
                utc(said["retry_at"]) if said.get("retry_at") else None,
                said.get("policy_version"),
            )
            self._notices.setdefault(tenant, []).append(found)

    def _in_a_batch(self, tenant: str, said: Mapping[str, Any], at: datetime, offset: int) -> None:
        """Whether balances are stale is one answer for all that a transaction decides."""
        if self._batch != (offset - 1, at):
            self._stale.clear()
        self._batch = (offset, at)
        asked = said["notice"] == "recharge_requested"
        if not asked and said.get("withheld") not in (*_NOT_STALE, "stale"):
            return
        stale = said.get("withheld") == "stale"
        other = self._stale.get(not stale)
        if other is not None and stale not in self._stale:
            one, another = (tenant, other) if stale else (other, tenant)
            text = f"{one} was told at {at.isoformat()} that its balance is stale, {another} not"
            self._torn.append((at, text))
        self._stale.setdefault(stale, tenant)

    # what is wrong

    def judge(
        self,
        requests: Mapping[str, Mapping[str, Mapping[str, Any]]],
        entries: Mapping[str, Sequence[Entry]],
        policies: Mapping[str, Mapping[int, Policy | None]],
        settled: Set[tuple[str, str]],
    ) -> Iterator[str]:
        """What was asked for, withheld or paused and should not have been. `entries` stand in
        their order, `settled` are payments that an earlier audit has seen."""
        yield from (text for at, text in self._torn if at <= self._until)
        vague = self._moved_without_a_word(settled)
        for tenant in sorted(self._notices.keys() | vague | self._standings.keys()):
            standing = self._standings.setdefault(tenant, self._first())
            walk = Walk(
                tenant,
                standing,
                requests.get(tenant, {}),
                entries.get(tenant, ()),
                policies.get(tenant, {}),
                self._commands,
                self._codes,
                self._complete,
            )
            if tenant in vague:
                standing.forget(self._until)
                continue
            for _, notices in groupby(
                self._notices.get(tenant, ()), lambda one: (one.cause, one.at)
            ):
                event = list(notices)
                if event[0].at <= self._results_since:
                    standing.forget(event[0].at)
                    continue
                found = list(walk.event(event))
                if event[0].at <= self._until:
                    yield from found
            standing.over = walk.may_be_over(_NEVER)

    def _first(self) -> Standing:
        """Where a tenant stands of whom nothing is known yet: at the beginning, or anywhere."""
        standing = Standing()
        if not self._knows:
            standing.forget(self._blank)
        return standing

    def _moved_without_a_word(self, settled: Set[tuple[str, str]]) -> set[str]:
        """Whose recharges may have moved without a notice: by the success of a request whose money
        was booked before under another name."""
        vague = set()
        for tenant, successes in self._successes.items():
            told = {one.cause for one in self._notices.get(tenant, ()) if one.kind in PAID}
            for one in successes:
                payment = (tenant, one.payment)
                if one.cause in told:
                    continue
                if payment in settled or len(self._names[payment]) > 1:
                    vague.add(tenant)
        return vague

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "knows_standings": self._knows,
            "standings": [
                [tenant, msgspec.to_builtins(standing)]
                for tenant, standing in self._standings.items()
            ],
        }
