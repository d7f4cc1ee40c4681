"""The auditor's own view of recharges: what was asked for, why, how much, and what became of it.

Like the auditor it shares no code with what it audits. It is told what the topics of one partition
hold, and judges only what they prove: what has left its topic, what an earlier audit has judged and
what is not below the position yet it leaves alone.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice, pairwise, takewhile
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.guards import Came, Guards, Request, Spent
from streams.testbed.auditor.pauses import Pauses
from streams.testbed.auditor.policies import MOST_TIMES, Policy, decimals, least, to_coins
from streams.testbed.auditor.records import EVER, nanos, shown, utc
from streams.testbed.auditor.standings import ATTEMPTS

_CREDITS: Final = {"recharge", "purchase", "orphan"}
_NEVER: Final = datetime.max.replace(tzinfo=UTC)
# Notices after which nothing is asked for a while.
_COOLS: Final = {"recharge_succeeded", "recharge_ended", "recharge_resolved"}
# Notices that say that a request is answered.
_ENDS: Final = {
    "recharge_succeeded",
    "orphan_payment",
    "recharge_declined",
    "recharge_ended",
    "recharge_resolved",
}


class Fault(Struct, frozen=True):
    """What is wrong, or, unless it is `proven`, what could not be looked at."""

    invariant: str
    text: str
    proven: bool = True


class Moved(Struct, frozen=True, gc=False):
    """An entry, as far as it matters here: `cause` is source and id in one word, `balance` what
    is there after it."""

    seq: int
    kind: str
    amount: int
    balance: int
    booked_at: datetime
    place: tuple[str, int, int]
    cause: str
    payment: str | None
    recharge_id: str | None


class Answer(Struct, frozen=True, gc=False):
    """A result that was not refused."""

    offset: int
    status: str
    cause: str


class Told(Struct, frozen=True, gc=False):
    """The last word about a recharge that was withheld."""

    at: datetime
    policy_version: int | None


class Recharges:
    """The recharges of one partition. Tell it what there is, then ask what is wrong.

    `until` is the instant of the position: what was decided later may be there in part. `since`
    says from when on a topic has everything. `trimmed` are sources whose first records are gone,
    `whole` says that no record was left to an earlier audit.
    """

    def __init__(
        self,
        *,
        until: datetime | None,
        since: Mapping[str, datetime],
        trimmed: Sequence[str],
        whole: bool,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self._until = until or EVER
        self._since = since
        self._trimmed = trimmed
        self._whole = whole
        # What an earlier audit has judged goes until then; one of before did not say.
        known = earlier if earlier is not None else {}
        self._judged = utc(known["until"]) if "until" in known else EVER
        self._guards = Guards(known, whole=whole)
        self._pauses = Pauses(
            known,
            whole=whole,
            since=since,
            judged=self._judged,
            until=self._until,
        )
        self._causes: dict[tuple[str, str], list[str]] = {}
        self._results: dict[str, list[Answer]] = {}
        self._named: dict[tuple[str, str], set[str]] = {}
        self._asked: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._in_force: dict[tuple[str, int], list[tuple[str, datetime]]] = {}
        self._funds: dict[tuple[str, str], int] = {}
        self._applied: set[str] = set(known.get("applied", ()))
        self._told: dict[str, dict[str, Any]] = dict(known.get("told", {}))
        self._ends: dict[str, datetime] = {one: utc(at) for one, at in known.get("ends", ())}
        self._end_causes: dict[str, set[str]] = {}
        self._unseen: set[str] = set(known.get("unseen", ()))
        self._withheld: dict[str, Told] = {
            tenant: Told(utc(at), version) for tenant, at, version in known.get("withheld", ())
        }
        self._holding: set[str] = set()
        self._policies: dict[str, dict[int, Policy | None]] = {}
        for tenant, version, said, since_then in known.get("policies", ()):
            policy = Policy(said, utc(since_then))
            self._policies.setdefault(tenant, {})[version] = policy

    # what there is

    def wants(self, requests: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Requests whose causes are to be found among the records that follow."""
        for tenant, of_tenant in requests.items():
            for one in of_tenant.values():
                cause = one.get("caused_by")
                if cause is not None and self._is_due(one):
                    self._causes.setdefault((tenant, cause), []).append(one["recharge_id"])

    def record(
        self,
        place: tuple[str, int, int],
        tenant: str,
        cause: str,
        body: Mapping[str, Any],
        *,
        refused: bool,
    ) -> None:
        """A record of a source topic that is an event."""
        if refused:
            return
        self._causes.pop((tenant, cause), None)
        topic, _, offset = place
        self._pauses.record(topic, tenant, cause, body)
        if topic == topics.RESULT:
            asked, payment = str(body.get("recharge_id")), str(body.get("payment_id"))
            self._named.setdefault((tenant, payment), set()).add(asked)
            answer = Answer(offset, str(body.get("status")), cause)
            self._results.setdefault(asked, []).append(answer)
        elif topic == topics.COMMAND:
            if body.get("command") == "settings" and body.get("policy") is not None:
                self._asked.setdefault((tenant, cause), []).append(body["policy"])
            elif body.get("command") == "fund":
                amount = nanos(body["amount"]["amount"])
                self._funds.setdefault((tenant, cause), amount)
        elif body.get("phase") in ("start", "progress"):
            self._holding.add(tenant)

    def notice(self, tenant: str, notice: Mapping[str, Any], offset: int | None = None) -> None:
        """A notice, in the order of the topic; `offset` is its place there, if that is known."""
        kind, at = notice["notice"], notice.get("at")
        if kind == "command_applied":
            self._applied.add(str(notice["command_id"]))
        if at is None:
            return
        self._pauses.notice(tenant, notice, offset)
        asked = notice.get("recharge_id")
        if kind == "recharge_requested" and asked is not None:
            self._told.setdefault(
                asked, {"tenant": tenant, "at": at, "amount": notice.get("amount")}
            )
        elif kind == "recharge_withheld":
            self._withheld[tenant] = Told(utc(at), notice.get("policy_version"))
        elif kind == "settings_changed" and notice.get("policy_version"):
            in_force = self._in_force.setdefault((tenant, notice["policy_version"]), [])
            in_force.append((str(notice.get("caused_by")), utc(at)))
        elif kind in _ENDS and asked is not None:
            self._end_causes.setdefault(asked, set()).add(str(notice.get("caused_by")))
            self._note_end(asked, utc(at))
            if kind in _COOLS:
                self._guards.cool(asked, utc(at))

    def approve(self, tenant: str, at: datetime) -> None:
        """A person has approved a recharge."""
        self._guards.approve(tenant, at)

    def spend(self, tenant: str, one: Spent) -> None:
        """A call to a destination of a risk class was charged."""
        self._guards.spend(tenant, one)

    def _note_end(self, asked: str, at: datetime) -> None:
        self._ends[asked] = min(at, self._ends.get(asked, at))

    def _is_due(self, request: Mapping[str, Any]) -> bool:
        """Whether a request is to be judged in this audit."""
        return self._judged < utc(request["requested_at"]) <= self._until

    def _complete(self, topic: str, at: datetime = EVER) -> bool:
        """Whether all that a topic was told from an instant on is known."""
        return self._since.get(topic, EVER) <= at

    # what is wrong

    def judge(
        self,
        requests: Mapping[str, Mapping[str, Mapping[str, Any]]],
        moved: Mapping[str, Sequence[Moved]],
        balances: Mapping[str, Mapping[str, Any]],
        *,
        settled: set[tuple[str, str]],
        answered: Mapping[str, set[str]],
    ) -> Iterator[Fault]:
        """All faults. `moved` are the entries of each tenant in their order, `balances` what was
        published last, `settled` payments that an earlier audit has seen, `answered` requests that
        have any answer."""
        self._pair_policies()
        paid = set(settled)
        yield from self._without_cause()
        for tenant, of_tenant in requests.items():
            entries = moved.get(tenant, ())
            for request in of_tenant.values():
                if self._is_due(request):
                    yield from self._right_amount(tenant, request)
                    yield from self._right_balance(tenant, request, entries)
                    yield from self._was_told(tenant, request)
        for tenant, entries in moved.items():
            yield from self._was_requested(tenant, requests.get(tenant, {}), entries, settled)
            self._note_ends(entries)
            self._note_money(tenant, entries, paid)
        self._guards.sort()
        for tenant, of_tenant in requests.items():
            auto = [one for one in of_tenant.values() if one["epoch"] is not None]
            auto.sort(key=lambda one: (one["epoch"], one["attempt"]))
            yield from self._one_after_the_other(tenant, auto, answered)
            by_hand = [one for one in of_tenant.values() if one["epoch"] is None]
            entries = moved.get(tenant, ())
            yield from self._allowed(tenant, auto, by_hand, entries, answered)
        for what in self._pauses.judge(requests, moved, self._policies, settled):
            yield Fault("recharge", what)
        yield from self._told_and_not_asked(requests)
        for tenant, public in balances.items():
            entries = moved.get(tenant, ())
            yield from self._asked_at_all(tenant, public, requests.get(tenant, {}), entries)

    def _pair_policies(self) -> None:
        """Which command set which version. One that cannot be told is not known."""
        for (tenant, version), in_force in self._in_force.items():
            said = [
                Policy(dict(policy), at)
                for cause, at in in_force
                for policy in self._asked.get((tenant, cause), ())
            ]
            of_tenant = self._policies.setdefault(tenant, {})
            if said and version not in of_tenant:
                same = all(one == said[0] for one in said)
                of_tenant[version] = said[0] if same else None

    def policy(self, tenant: str, version: int | None) -> Policy | None:
        """The policy of a version, once all is judged; None when no command is known to have set
        it."""
        return self._policies.get(tenant, {}).get(version or 0)

    def _without_cause(self) -> Iterator[Fault]:
        for (tenant, cause), asked in self._causes.items():
            if cause.startswith("tick/"):
                continue
            if self._trimmed:
                text = f"{', '.join(self._trimmed)} do not begin at 0; requests name records before"
                yield Fault("cause", text, proven=False)
            elif self._whole:
                yield Fault(
                    "cause", f"request {asked[0]} of {tenant} names {cause}, which is not there"
                )

    def _right_amount(self, tenant: str, request: Mapping[str, Any]) -> Iterator[Fault]:
        """What is asked for is needed, and as much as the policy says."""
        name = f"request {request['recharge_id']} of {tenant}"
        amount, currency = nanos(request["amount"]), request.get("currency")
        if "amount_minor" in request:
            coin = 10 ** (9 - request["exponent"])
            right = request["exponent"] == decimals(str(currency))
            if not right or request["amount_minor"] * coin != amount:
                yield Fault("recharge", f"{name} says {request['amount']} otherwise in minor units")
        if request["epoch"] is None:
            asked = self._funds.get((tenant, str(request.get("caused_by"))))
            if asked is not None and currency and to_coins(asked, currency) != amount:
                yield Fault(
                    "recharge",
                    f"{name} asks for {request['amount']}, its command for {shown(asked)}",
                )
            return
        if request.get("trigger") is None or "available" not in request:
            return
        trigger, available = nanos(request["trigger"]), nanos(request["available"])
        if available > trigger:
            yield Fault(
                "recharge", f"{name} has {shown(available)}, not below {request['trigger']}"
            )
        version = request.get("policy_version")
        policy = self.policy(tenant, version)
        if policy is None or currency is None:
            return
        at = utc(request["requested_at"])
        following = self.policy(tenant, (version or 0) + 1)
        if at < policy.since or (following is not None and following.since < at):
            yield Fault("recharge", f"{name} goes by policy {version}, which was not in force")
        if not policy.enabled:
            yield Fault("recharge", f"{name} goes by policy {version}, which asks for nothing")
            return
        if trigger != policy.trigger:
            yield Fault(
                "recharge",
                f"{name} has trigger {request['trigger']}, its policy {shown(policy.trigger)}",
            )
        if not policy.below(available) and available <= trigger:
            yield Fault("recharge", f"{name} has {shown(available)}, which is enough")
        wanted = policy.amount(available, currency)
        if amount != wanted:
            yield Fault(
                "recharge",
                f"{name} asks for {request['amount']} with {shown(available)} there, its policy "
                f"says {shown(wanted)}",
            )
        too_little = amount < least(currency) and policy.said.get("method") != "target"
        if too_little or amount > MOST_TIMES * least(currency):
            yield Fault("recharge", f"{name} asks for {request['amount']}, which nobody may")

    def _right_balance(
        self, tenant: str, request: Mapping[str, Any], entries: Sequence[Moved]
    ) -> Iterator[Fault]:
        """The balance it states is that of the ledger: after what caused it, or, when that moved
        nothing, one of that instant."""
        if "balance" not in request:
            return
        at = utc(request["requested_at"])
        first = bisect_left(entries, at, key=lambda one: one.booked_at)
        before = entries[max(0, first - 1) : first]
        same = list(takewhile(lambda one: one.booked_at == at, islice(entries, first, None)))
        if not before and not (same and same[0].seq == 1):
            # Its entries may be among those that an earlier audit has read, or there are none.
            if entries or not self._whole:
                return
        cause = str(request.get("caused_by"))
        by_cause = [one for one in same if one.cause == cause]
        possible = {one.balance for one in same} | {before[-1].balance if before else 0}
        if by_cause and not cause.startswith("tick/"):
            possible = {by_cause[-1].balance}
        if nanos(request["balance"]) not in possible:
            yield Fault(
                "recharge",
                f"request {request['recharge_id']} of {tenant} states a balance of "
                f"{request['balance']}, which the ledger had not",
            )

    def _was_requested(
        self,
        tenant: str,
        requests: Mapping[str, Mapping[str, Any]],
        entries: Sequence[Moved],
        settled: set[tuple[str, str]],
    ) -> Iterator[Fault]:
        """A payment is a recharge by the request that it answers; later it may name another."""
        for one in entries:
            if one.payment is not None and one.recharge_id is not None:
                self._named.setdefault((tenant, one.payment), set()).add(one.recharge_id)
        auto = {name for name, asked in requests.items() if asked["epoch"] is not None}
        for one in entries:
            if one.kind != "recharge" or one.booked_at > self._until:
                continue
            names = {one.recharge_id}
            if one.payment is not None:
                if (tenant, one.payment) in settled:
                    continue
                names |= self._named.get((tenant, one.payment), set())
            if names & auto:
                continue
            known = self._complete(topics.REQUESTED) and self._complete(topics.RESULT)
            if known:
                text = f"{tenant}/{one.seq} is a recharge {one.recharge_id}, never requested"
                yield Fault("recharge", text)
            else:
                text = "requests that were credited are no longer there"
                yield Fault("recharge", text, proven=False)

    def _note_ends(self, entries: Sequence[Moved]) -> None:
        for one in entries:
            if one.kind in _CREDITS and one.recharge_id is not None:
                self._end_causes.setdefault(one.recharge_id, set()).add(one.cause)
                self._note_end(one.recharge_id, one.booked_at)

    def _may_have_ended(self, request: Mapping[str, Any]) -> bool:
        """Whether a request can have been answered without a trace: by a success of which all
        money was booked before, or by what has left its topic."""
        asked, at = request["recharge_id"], utc(request["requested_at"])
        known = all(self._complete(one, at) for one in (topics.RESULT, topics.NOTIFICATION))
        if asked in self._unseen or not known:
            return True
        for one in sorted(self._results.get(asked, ()), key=lambda one: one.offset):
            if one.cause in self._end_causes.get(asked, ()):
                return False
            if one.status == "succeeded":
                self._unseen.add(asked)
                return True
        return False

    def _one_after_the_other(
        self,
        tenant: str,
        auto: Sequence[Mapping[str, Any]],
        answered: Mapping[str, set[str]],
    ) -> Iterator[Fault]:
        """A request is made when the one before it has ended, and not while it waits. That it
        was answered at all is asked elsewhere."""
        # The last one, too: a later audit does not see its answers again.
        vague = {one["recharge_id"] for one in auto if self._may_have_ended(one)}
        for earlier, later in pairwise(auto):
            if not answered.get(earlier["recharge_id"]) or not self._is_due(later):
                continue
            ended = self._ends.get(earlier["recharge_id"])
            if earlier["recharge_id"] in vague:
                continue
            if ended is not None and ended <= utc(later["requested_at"]):
                continue
            when = "was not yet" if ended is None else f"at {ended.isoformat()} was"
            yield Fault(
                "one_request",
                f"{tenant} was asked for {later['recharge_id']} at {later['requested_at']}, "
                f"{earlier['recharge_id']} {when} answered",
            )

    def _note_money(
        self, tenant: str, entries: Sequence[Moved], paid: set[tuple[str, str]]
    ) -> None:
        """What came, for the caps. More of a payment counts as money, but not once more."""
        for one in entries:
            if one.kind in _CREDITS:
                payment = (tenant, str(one.payment))
                counts = int(payment not in paid)
                self._guards.come(tenant, Came(one.booked_at, one.amount, counts, one.seq))
                paid.add(payment)
            if one.kind == "recharge" and one.recharge_id is not None:
                self._guards.cool(one.recharge_id, one.booked_at)

    def _allowed(
        self,
        tenant: str,
        auto: Sequence[Mapping[str, Any]],
        by_hand: Sequence[Mapping[str, Any]],
        entries: Sequence[Moved],
        answered: Mapping[str, set[str]],
    ) -> Iterator[Fault]:
        """No guard forbids a request, and it says rightly why it is made."""
        for one in by_hand:
            if self._is_due(one) and one.get("reason", "fund") != "fund":
                yield Fault(
                    "recharge", f"request {one['recharge_id']} of {tenant} says {one['reason']}"
                )
        complete = self._complete(topics.COMMAND) and self._complete(topics.NOTIFICATION)
        waiting = [(nanos(one["amount"]), self._waited(one)) for one in by_hand]
        for place, one in enumerate(auto):
            if not self._is_due(one):
                continue
            at, before = utc(one["requested_at"]), auto[max(0, place - ATTEMPTS) : place]
            since = utc(before[-1]["requested_at"]) if before else at
            request = Request(
                one,
                at,
                self._policies.get(tenant, {}),
                before,
                [amount for amount, (first, last) in waiting if first < at < last],
                answered if self._complete(topics.RESULT, since) else {},
                self._ends,
                _last_of(str(one.get("caused_by")), at, entries),
            )
            for what in self._guards.judge(tenant, request, complete=complete):
                yield Fault("recharge", f"request {one['recharge_id']} of {tenant} {what}")

    def _waited(self, request: Mapping[str, Any]) -> tuple[datetime, datetime]:
        """Between which instants a request had no answer, beyond doubt."""
        began, ended = utc(request["requested_at"]), self._ends.get(request["recharge_id"])
        if ended is None:
            ended = began if self._may_have_ended(request) else _NEVER
        return began, ended

    def _was_told(self, tenant: str, request: Mapping[str, Any]) -> Iterator[Fault]:
        """Every request comes with its notice, or, by hand, with its command's answer."""
        asked = request["recharge_id"]
        if not self._complete(topics.NOTIFICATION, utc(request["requested_at"])):
            return
        if request["epoch"] is None:
            if asked not in self._applied:
                yield Fault("recharge", f"request {asked} of {tenant} is of no command applied")
            return
        told = self._told.get(asked)
        if told is None or told["tenant"] != tenant:
            yield Fault("recharge", f"request {asked} of {tenant} is in no notice")
        elif told["amount"] is not None and nanos(told["amount"]) != nanos(request["amount"]):
            yield Fault("recharge", f"request {asked} of {tenant} was told as {told['amount']}")

    def _told_and_not_asked(
        self, requests: Mapping[str, Mapping[str, Mapping[str, Any]]]
    ) -> Iterator[Fault]:
        for asked, told in self._told.items():
            at = utc(told["at"])
            due = self._judged < at <= self._until and self._complete(topics.REQUESTED, at)
            if due and asked not in requests.get(told["tenant"], {}):
                yield Fault("recharge", f"{told['tenant']} was told of {asked}, never requested")

    def _asked_at_all(
        self,
        tenant: str,
        public: Mapping[str, Any],
        requests: Mapping[str, Mapping[str, Any]],
        entries: Sequence[Moved],
    ) -> Iterator[Fault]:
        """Who is below the trigger in the end has a request in flight, or was told why not."""
        version = public.get("policy_version")
        policy = self.policy(tenant, version)
        if policy is None or public.get("closed"):
            return
        if "as_of" not in public or "available" not in public:
            return
        if utc(public["as_of"]) > self._until or not policy.enabled:
            return
        available = nanos(public["available"])
        if not policy.below(available):
            return
        asked = public.get("recharge_id")
        if public.get("recharge_state") == "requested" and asked is not None:
            if asked not in requests and self._complete(topics.REQUESTED):
                yield Fault("recharge", f"{tenant} waits for {asked}, never requested")
            return
        if not self._complete(topics.NOTIFICATION):
            return
        told = self._withheld.get(tenant)
        # What open calls held nobody can say when they may have left their topic.
        vague = tenant in self._holding or self._trimmed or not self._whole
        enough = [] if vague else self._enough(policy, entries)
        since = max(enough, default=EVER)
        if told is None or told.policy_version != version or told.at < since:
            yield Fault(
                "recharge",
                f"{tenant} has {public['available']}, below its trigger of "
                f"{shown(policy.trigger)}; nothing is asked for, and no notice says why",
            )

    @staticmethod
    def _enough(policy: Policy, entries: Sequence[Moved]) -> Iterator[datetime]:
        """When an event has left enough on the account."""
        for one, following in zip(entries, [*entries[1:], None], strict=True):
            last = following is None or following.place != one.place or following.cause != one.cause
            if last and not policy.below(one.balance):
                yield one.booked_at

    # what a later audit needs

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "until": max(self._until, self._judged).isoformat(),
            "told": self._told,
            "applied": sorted(self._applied),
            "ends": [[one, at.isoformat()] for one, at in self._ends.items()],
            "unseen": sorted(self._unseen),
            **self._guards.checkpoint(max(self._until, self._judged)),
            **self._pauses.checkpoint(),
            "withheld": [
                [tenant, told.at.isoformat(), told.policy_version]
                for tenant, told in self._withheld.items()
            ],
            "policies": [
                [tenant, version, msgspec.to_builtins(policy.said), policy.since.isoformat()]
                for tenant, versions in self._policies.items()
                for version, policy in versions.items()
                if policy is not None
            ],
        }


def _last_of(cause: str, at: datetime, entries: Sequence[Moved]) -> int:
    """The number of the last entry of a cause at an instant; 0 when there is none, or it is time
    that has caused it: whatever is due at an instant has one name."""
    first = bisect_left(entries, at, key=lambda one: one.booked_at)
    same = takewhile(lambda one: one.booked_at == at, islice(entries, first, None))
    if cause.startswith("tick/"):
        return 0
    return max((one.seq for one in same if one.cause == cause), default=0)
