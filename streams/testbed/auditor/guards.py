"""Guards: what forbids a request though money is missing, written anew from the contract.

Caps and the daily count look at the money that came, a cooldown at the answers before, velocity at
what was spent on a risk class. What cannot be proven is left out of each sum, so a guard that finds
too little says nothing: an audit that does not see far enough back is silent, and never wrong.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from msgspec import Struct

from streams.testbed.auditor.policies import Policy
from streams.testbed.auditor.records import EPOCH, EVER, nanos, shown, utc

_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
# Spend on a risk class is counted in blocks of four hours, money by the hour or day: for so many of
# them, and what is left of the one in which they begin.
_BLOCK: Final = timedelta(hours=4)
_BLOCKS: Final = 6
# What a cap is called, in which units it counts, and how many of them it looks back.
_CAPS: Final = (
    ("daily_cap", _HOUR, 24),
    ("weekly_cap", _DAY, 7),
    ("monthly_cap", _DAY, 30),
)
# No guard looks back longer than a month and what is left of its first day, no cooldown lasts
# longer than a day.
_LONGEST: Final = timedelta(days=32)
_LONGEST_COOLDOWN: Final = timedelta(days=1)


class Came(Struct, frozen=True, gc=False, array_like=True):
    """Money that came, for the caps. `counts` is 0 for more of a payment that came before."""

    at: datetime
    nanos: int
    counts: int
    seq: int


class Spent(Struct, frozen=True, gc=False, array_like=True):
    """A charge for a destination of a risk class."""

    at: datetime
    nanos: int
    risk: str
    seq: int


Moment = TypeVar("Moment", Came, Spent)


class Request(Struct, frozen=True):
    """A request as guards see it. `before` are the last automatic ones before it, in their order;
    `in_flight` what was asked for by hand and had no answer, in nanos; `answers` the statuses of
    each answered request, none at all where some may be gone; `seq` the last entry of its cause,
    if there is one."""

    said: Mapping[str, Any]
    at: datetime
    policies: Mapping[int, Policy | None]
    before: Sequence[Mapping[str, Any]]
    in_flight: Sequence[int]
    answers: Mapping[str, Set[str]]
    ends: Mapping[str, datetime]
    seq: int

    @property
    def version(self) -> int:
        """The policy that it names."""
        return self.said.get("policy_version") or 0

    @property
    def policy(self) -> Policy | None:
        """The policy that it names, if that is known."""
        return self.policies.get(self.version)

    def follows(self, one: Came | Spent) -> bool:
        """Whether money moved before it, beyond doubt: a batch has one instant for all it books."""
        return one.at < self.at or (one.at == self.at and one.seq <= self.seq)

    def policies_from(self, at: datetime) -> list[Policy]:
        """The policies that can have been in force from an instant on until now; none when they
        are not all known."""
        found = []
        for version in range(self.version, 0, -1):
            policy = self.policies.get(version)
            if policy is None:
                return []
            found.append(policy)
            if policy.since < at:
                return found
        return []


class Guards:
    """What the guards of a partition's tenants look at. Tell it what there is, then ask. `whole`
    says that no audit was there before, or `earlier` what it has said."""

    def __init__(self, earlier: Mapping[str, Any], *, whole: bool) -> None:
        self._came: dict[str, list[Came]] = {}
        for tenant, at, *came in earlier.get("came", ()):
            self.come(tenant, Came(utc(at), *came))
        self._spent: dict[str, list[Spent]] = {}
        for tenant, at, *spent in earlier.get("spent", ()):
            self.spend(tenant, Spent(utc(at), *spent))
        # When a success, an end or a person's word may have begun a cooldown, by request.
        self._cooled: dict[str, set[datetime]] = {}
        for asked, at in earlier.get("cooled", ()):
            self.cool(asked, utc(at))
        self._knows_approvals = whole or "approved" in earlier
        self._approved: dict[str, datetime] = {
            tenant: utc(at) for tenant, at in earlier.get("approved", ())
        }

    def come(self, tenant: str, one: Came) -> None:
        """Money came, in the order of the ledger."""
        self._came.setdefault(tenant, []).append(one)

    def spend(self, tenant: str, one: Spent) -> None:
        """Money was spent on a risk class, in any order."""
        self._spent.setdefault(tenant, []).append(one)

    def cool(self, asked: str, at: datetime) -> None:
        """A request had an answer that begins a cooldown, unless another was in flight."""
        self._cooled.setdefault(asked, set()).add(at)

    def approve(self, tenant: str, at: datetime) -> None:
        """A person has approved what velocity withheld."""
        self._approved[tenant] = max(at, self._approved.get(tenant, at))

    def sort(self) -> None:
        """All is told: what came on several topics is put in order."""
        for spent in self._spent.values():
            spent.sort(key=lambda one: one.at)

    def judge(self, tenant: str, request: Request, *, complete: bool) -> Iterator[str]:
        """What forbade an automatic request. `complete` says that no command is missing."""
        yield from self._reason(tenant, request, complete=complete)
        if request.policy is None:
            return
        yield from self._cooldown(request)
        yield from self._caps(tenant, request, request.policy)
        yield from self._velocity(tenant, request, request.policy)

    def _reason(self, tenant: str, request: Request, *, complete: bool) -> Iterator[str]:
        """A retry follows a decline; the first attempt was approved, or needed no approval."""
        said = request.said
        if "reason" not in said:
            return
        reason, again = said["reason"], said["attempt"] > 1
        if again != (reason == "retry") or reason not in ("below_trigger", "approved", "retry"):
            yield f"is attempt {said['attempt']} and says {reason}"
        if again and request.before:
            last = request.before[-1]
            had = request.answers.get(last["recharge_id"], set())
            same = (last["epoch"], last["attempt"]) == (said["epoch"], said["attempt"] - 1)
            if same and had and not had & {"declined", "gone"}:
                yield f"is attempt {said['attempt']}, but the one before it was {min(had)}"
        if reason == "approved" and complete and self._knows_approvals:
            approved = self._approved.get(tenant)
            if approved is None or any(approved < at for at in self._cooldowns(request)):
                yield "is said to be approved, and nobody has since the last cooldown"

    def _cooldowns(self, request: Request) -> Iterator[datetime]:
        """When cooldowns began, beyond doubt, before a request: at answers to one of the last
        attempts while no other was in flight."""
        before = request.before
        for one in before:
            for at in self._cooled.get(one["recharge_id"], ()):
                if at > request.at:
                    continue
                if at == request.at and not (one is before[-1] and self._ended_at(request)):
                    continue
                if not any(
                    other is not one
                    and utc(other["requested_at"]) <= at
                    and request.ends.get(other["recharge_id"], at) >= at
                    for other in before
                ):
                    yield at

    @staticmethod
    def _ended_at(request: Request) -> bool:
        """Whether the one before was in flight until this very instant, and was not declined: then
        its answer came first."""
        last = request.before[-1]["recharge_id"]
        had = request.answers.get(last, set())
        return request.ends.get(last) == request.at and bool(had) and "declined" not in had

    def _cooldown(self, request: Request) -> Iterator[str]:
        for began in self._cooldowns(request):
            policies = request.policies_from(began)
            if not policies:
                continue
            # A later answer may have begun another one, by the policy of its time.
            ends = began + timedelta(seconds=min(one.cooldown_s for one in policies))
            if request.at < ends:
                yield f"is made in the cooldown from {began.isoformat()} to {ends.isoformat()}"

    def _caps(self, tenant: str, request: Request, policy: Policy) -> Iterator[str]:
        def since(unit: timedelta, count: int) -> Sequence[Came]:
            start = EPOCH + ((request.at - EPOCH) // unit - count) * unit
            return _from(self._came.get(tenant, []), start)

        in_flight, day = len(request.in_flight), since(_HOUR, 24)
        # Where even all of it is not too much, none of it is looked at.
        if len(day) + in_flight >= policy.max_per_day:
            count = sum(one.counts for one in day if request.follows(one)) + in_flight
            if count >= policy.max_per_day:
                yield f"follows {count} in a day, {policy.max_per_day} are allowed"
        asked = nanos(request.said["amount"]) + sum(request.in_flight)
        for name, unit, length in _CAPS:
            cap = policy.cap(name)
            if cap is None:
                continue
            came = (one.nanos for one in since(unit, length) if request.follows(one))
            found = asked + sum(came)
            if found > cap:
                yield f"makes it {shown(found)}, the {name} is {shown(cap)}"

    def _velocity(self, tenant: str, request: Request, policy: Policy) -> Iterator[str]:
        """What was approved stays so until its epoch ends; a retry may be of such an epoch."""
        if request.said.get("reason") != "below_trigger":
            return
        start = (request.at - EPOCH) // _BLOCK - _BLOCKS
        for risk, limit in policy.velocity.items():
            since = self._limited_since(request, risk)
            spent = sum(
                one.nanos
                for one in _from(self._spent.get(tenant, []), EPOCH + start * _BLOCK)
                if one.risk == risk and since < one.at and request.follows(one)
            )
            if spent > limit:
                yield f"follows {shown(spent)} spent on {risk}, above {shown(limit)}: not approved"

    @staticmethod
    def _limited_since(request: Request, risk: str) -> datetime:
        """From when on spend on a risk class is counted: since it has had a limit."""
        since = request.at
        for version in range(request.version, 0, -1):
            policy = request.policies.get(version)
            if policy is None or risk not in policy.velocity:
                break
            since = policy.since
        return since

    def checkpoint(self, until: datetime) -> dict[str, Any]:
        """What a later run needs of what is not too long ago."""
        oldest = until - min(_LONGEST, until - EVER)
        cooling = until - min(_LONGEST_COOLDOWN, until - EVER)
        known = {
            "came": [
                [tenant, one.at.isoformat(), one.nanos, one.counts, one.seq]
                for tenant, came in self._came.items()
                for one in came
                if one.at >= oldest
            ],
            "spent": [
                [tenant, one.at.isoformat(), one.nanos, one.risk, one.seq]
                for tenant, spent in self._spent.items()
                for one in spent
                if one.at >= oldest
            ],
            "cooled": [
                [asked, at.isoformat()]
                for asked, found in self._cooled.items()
                for at in sorted(found)
                if at >= cooling
            ],
        }
        if self._knows_approvals:
            known["approved"] = [[tenant, at.isoformat()] for tenant, at in self._approved.items()]
        return known


def _from(known: Sequence[Moment], at: datetime) -> Sequence[Moment]:
    """What is not before an instant, of what is in order."""
    return known[bisect_left(known, at, key=lambda one: one.at) :]
