"""Where a tenant's recharges stand: what declines, answers and commands lead to, written anew.

Notices stand in the order in which things were decided. A walk goes from one to the next, with what
commands and results say of them, and says what should not have been asked for, paused or withheld.
What the topics leave open is unknown from then on until something settles it, and of what is
unknown nothing is said.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from streams.testbed.auditor.policies import Policy
from streams.testbed.auditor.records import EPOCH, EVER, nanos, utc

# What a decline says: asking again only does harm, or does so without another method.
_TERMINAL: Final = {"lost_card", "stolen_card", "fraud", "authentication_required"}
_EXPIRED: Final = "expired_card"
_MOST_IN_A_ROW: Final = 4
_BACK_OFF: Final = timedelta(hours=1)
# A payment method is asked until it was declined so often in so many days, the oldest in full.
_MOST_DECLINES: Final = 15
_DECLINE_DAYS: Final = 30
_DAY: Final = timedelta(days=1)
# Where more methods than these were declined, the product forgets some, and so do we all.
_MOST_METHODS: Final = 8
# A late success of an attempt before these is nobody's.
ATTEMPTS: Final = 15
# No method is left that was not declined too often.
_NONE_LEFT: Final = -1

_UNSET: Final = Policy({}, EVER)
# Reasons that are given for nothing while recharges are paused.
UNPAUSED: Final = {
    "cooling",
    "attempts_exhausted",
    "daily_count",
    "daily_amount",
    "weekly_amount",
    "monthly_amount",
    "velocity",
    "above_max",
}
# Notices of money that came.
PAID: Final = {"recharge_succeeded", "orphan_payment"}


class Notice(Struct, frozen=True, gc=False):
    """A notice, as far as it matters here. `said` is its rule or why something was withheld."""

    kind: str
    at: datetime
    cause: str
    asked: str | None
    said: str | None
    code: str | None
    retry_at: datetime | None
    version: int | None


class Entry(Protocol):
    """An entry, as far as it matters here."""

    @property
    def booked_at(self) -> datetime:
        """When it was booked."""

    @property
    def cause(self) -> str:
        """Source and id of what has caused it."""

    @property
    def balance(self) -> int:
        """What is there after it, in nanos."""


class Command(Struct, frozen=True):
    """What a command says that may move recharges; `methods` are the payment methods it names."""

    word: str
    methods: list[str] | None = None
    paid: bool = False


class Standing(Struct, omit_defaults=True):
    """Where a tenant's recharges stand. None: nobody can say.

    `last` is the request made last, at `begun` by `cause` with a balance of `had`; it `waits` for
    its answer. So many declines came `in_row`, `paused` says that nothing is asked, `again` that
    the epoch goes on, with the payment method at `place`, after so many `rounds` in which all were
    declined. It `cools` until then. `versions` are the policies in force since `begun`; the epoch
    may be `over` because money came. `declined` are the days of declines by method, all of them
    since `counted`.
    """

    methods: list[str] | None = []
    last: str | None = None
    waits: bool | None = False
    in_row: int | None = 0
    paused: bool | None = False
    again: bool | None = False
    place: int | None = 0
    rounds: int | None = 0
    cools: datetime | None = EVER
    begun: datetime = EVER
    cause: str = ""
    had: int | None = None
    versions: list[int | None] = msgspec.field(default_factory=lambda: [0])
    over: bool = False
    declined: dict[str, list[int]] = {}
    counted: datetime = EVER

    def forget(self, at: datetime) -> None:
        """Something has happened at an instant of which nobody can say what it was."""
        self.methods = self.last = self.waits = self.in_row = self.paused = None
        self.versions = [None]
        self.counted = max(at, self.counted)
        self.lose_track()

    def lose_track(self) -> None:
        """The epoch may go on or not."""
        self.again = self.place = self.rounds = self.cools = None

    def end(self) -> None:
        """The epoch is over."""
        self.again, self.place, self.rounds = False, 0, 0


class Walk:
    """One tenant's way from notice to notice."""

    def __init__(
        self,
        tenant: str,
        standing: Standing,
        requests: Mapping[str, Mapping[str, Any]],
        entries: Sequence[Entry],
        policies: Mapping[int, Policy | None],
        commands: Mapping[tuple[str, str], Command | None],
        codes: Mapping[tuple[str, str], Set[str | None]],
        complete: bool,
    ) -> None:
        self._tenant = tenant
        self._now = standing
        self._requests = requests
        self._entries = entries
        self._policies = policies
        self._commands = commands
        self._codes = codes
        self._complete = complete

    def event(self, notices: Sequence[Notice]) -> Iterator[str]:
        """What is wrong with the notices of one event, in their order."""
        now = self._now
        for one in notices:
            if one.kind == "command_applied":
                self._applied(one)
            elif one.kind == "settings_changed":
                now.versions.append(one.version)
            elif one.kind in PAID:
                self._paid(one)
            elif one.kind == "recharge_paused":
                yield from self._paused(one, notices)
            elif one.kind == "recharge_declined":
                yield from self._declined(one, notices)
            elif one.kind in ("recharge_ended", "recharge_resolved"):
                self._ended(one)
            elif one.kind == "recharge_withheld":
                yield from self._withheld(one)
            elif one.kind == "recharge_requested":
                yield from self._requested(one)

    # what moves recharges

    def _applied(self, notice: Notice) -> None:
        """A command was applied."""
        now, said = self._now, self._commands.get((self._tenant, notice.cause))
        if said is None:
            now.forget(notice.at)
        elif said.word == "book_payment":
            now.in_row, now.paused = 0, False
        elif said.word == "deny":
            now.paused = True
            now.end()
        elif said.word == "settings" and said.methods is not None:
            if now.methods is None:
                self._perhaps_a_new_method()
            elif set(said.methods) - set(now.methods):
                now.in_row, now.place, now.paused = 0, 0, False
            now.methods = list(said.methods)

    def _perhaps_a_new_method(self) -> None:
        """A payment method begins anew where it was not there before."""
        now = self._now
        if now.in_row:
            now.in_row = None
        if now.place:
            now.place = None
        if now.paused:
            now.paused = None

    def _paid(self, notice: Notice) -> None:
        """Money came: nothing is paused any more, and an attempt that was paid ends its epoch
        unless another is in flight."""
        now, request = self._now, self._requests.get(str(notice.asked))
        now.in_row, now.paused = 0, False
        if request is None:
            if not self._complete:
                now.lose_track()
            return
        if request["epoch"] is None or (now.waits and notice.asked != now.last):
            return
        if notice.asked == now.last:
            self._cool(notice.at)
        elif now.waits is None or now.last is None:
            now.lose_track()
        elif self._is_known(request):
            self._cool(notice.at)

    def _is_known(self, request: Mapping[str, Any]) -> bool:
        """Whether an attempt is one of the last ones."""
        first, last = _try_of(request), _try_of(self._requests[str(self._now.last)])
        of_later = (one for one in self._requests.values() if one["epoch"] is not None)
        return sum(first < _try_of(one) <= last for one in of_later) < ATTEMPTS

    def _ended(self, notice: Notice) -> None:
        """A request came to nothing, or a person has decided what became of it."""
        now, said = self._now, self._commands.get((self._tenant, notice.cause))
        request = self._requests.get(str(notice.asked))
        resolved = notice.kind == "recharge_resolved"
        if request is None or (resolved and said is None):
            now.forget(notice.at)
            return
        paid = resolved and said is not None and said.paid
        if request["epoch"] is not None:
            self._cool(notice.at)
        elif paid:
            now.paused = False
        if paid:
            now.in_row = 0

    def _cool(self, at: datetime) -> None:
        now, policy = self._now, self._policy(self._now.versions[-1])
        now.end()
        now.waits = now.paused = False
        now.cools = None if policy is None else at + timedelta(seconds=policy.cooldown_s)

    def _policy(self, version: int | None) -> Policy | None:
        return _UNSET if version == 0 else self._policies.get(version or 0)

    def _declined(self, notice: Notice, notices: Sequence[Notice]) -> Iterator[str]:
        """The request in flight was declined: another method is asked, or all of them later, or
        none at all."""
        now, request = self._now, self._requests.get(str(notice.asked))
        if request is None:
            now.forget(notice.at)
            return
        if request["epoch"] is None:
            return
        name = f"the decline of {notice.asked} of {self._tenant}"
        told = next(
            (one for one in notices if one.kind == "recharge_paused" and one.asked == notice.asked),
            None,
        )
        in_row = None if now.in_row is None else now.in_row + 1
        terminal = self._is_terminal(notice)
        pauses: bool | None = terminal or (None if in_row is None else in_row >= _MOST_IN_A_ROW)
        if terminal is None and not pauses:
            pauses = None
        if pauses is not None and pauses != (told is not None):
            which = f"with {notice.code or 'no code'}, number {in_row or 'unknown'} in a row,"
            yield f"{name} {which} {'pauses nothing' if told is None else 'pauses recharges'}"
        elif told is not None and terminal is not None:
            rule = "terminal_decline" if terminal else "declines_in_row"
            if told.said not in (None, rule):
                yield f"{name} pauses recharges for {told.said}, not for {rule}"
        covered = self._money_came(notice.at)
        another = self._another(notice.at)
        self._count(request, notice.at)
        now.in_row, now.waits, now.over = in_row, False, False
        now.paused = told is not None
        if now.paused:
            now.end()
            now.cools = EVER
        elif covered:
            now.lose_track()
        else:
            yield from self._goes_on(notice, name, another)

    def _goes_on(self, notice: Notice, name: str, another: int | None) -> Iterator[str]:
        """After a decline that ends neither epoch nor recharges."""
        now = self._now
        now.again = True
        if another is None:
            now.place = now.rounds = now.cools = None
            return
        if another != _NONE_LEFT:
            now.place, now.cools = another, EVER
        else:
            now.place = 0
            now.rounds = None if now.rounds is None else now.rounds + 1
            now.cools = notice.retry_at
            if now.rounds is not None:
                now.cools = notice.at + _BACK_OFF * 2 ** (now.rounds - 1)
        right = None if now.cools == EVER else now.cools
        if notice.retry_at != right:
            yield f"{name} is followed by another try {_when(notice.retry_at)}, not {_when(right)}"

    def _is_terminal(self, notice: Notice) -> bool | None:
        """Whether a decline alone is reason to ask no more."""
        codes = self._codes.get((self._tenant, notice.cause), set())
        code = next(iter(codes)) if len(codes) == 1 else notice.code
        if code != _EXPIRED:
            return code in _TERMINAL
        methods = self._now.methods
        return None if methods is None else len(methods) <= 1

    def _another(self, at: datetime) -> int | None:
        """The place of the method after the one that was declined."""
        now = self._now
        if now.methods is None or now.place is None:
            return None
        return self._first_of(range(now.place + 1, max(1, len(now.methods))), at)

    def _first_of(self, places: range, at: datetime) -> int | None:
        """The first place whose method was not declined too often; None where nobody can say."""
        methods = self._now.methods or [""]
        for place in places:
            worn = self._is_worn(methods[place % len(methods)], at)
            if worn is None:
                return None
            if not worn:
                return place % len(methods)
        return _NONE_LEFT

    def _is_worn(self, method: str, at: datetime) -> bool | None:
        """Whether a payment method was declined as often as it may be."""
        now, first = self._now, (at - EPOCH) // _DAY - _DECLINE_DAYS
        if sum(day >= first for day in now.declined.get(method, ())) >= _MOST_DECLINES:
            return True
        return False if now.counted <= EPOCH + first * _DAY else None

    def _count(self, request: Mapping[str, Any], at: datetime) -> None:
        """Remember a decline for as long as it counts."""
        if "payment_method" not in request:
            self._now.counted = max(at, self._now.counted)
            return
        day = (at - EPOCH) // _DAY
        method = request["payment_method"] or ""
        declined = {**self._now.declined, method: [*self._now.declined.get(method, ()), day]}
        kept = {
            one: [found for found in days if found >= day - _DECLINE_DAYS]
            for one, days in declined.items()
        }
        self._now.declined = {one: days for one, days in kept.items() if days}
        if len(self._now.declined) > _MOST_METHODS:
            self._now.declined, self._now.counted = {}, max(at, self._now.counted)

    def _paused(self, notice: Notice, notices: Sequence[Notice]) -> Iterator[str]:
        """Recharges are paused by a decline, or by a person."""
        now, said = self._now, self._commands.get((self._tenant, notice.cause))
        if any(one.kind == "recharge_declined" and one.asked == notice.asked for one in notices):
            return
        applied = any(one.kind == "command_applied" for one in notices)
        if applied and (said is None or said.word == "deny"):
            return
        now.paused = True
        yield f"{self._tenant} was paused at {notice.at.isoformat()}, and nothing says why"

    # what recharges come to

    def _withheld(self, notice: Notice) -> Iterator[str]:
        now = self._now
        if self._is_wrong(notice):
            at = notice.at.isoformat()
            yield f"{self._tenant} was told {notice.said} at {at}, which is not so"
        elif notice.said == "paused":
            now.paused = True

    def _is_wrong(self, notice: Notice) -> bool:
        """Whether what people were told to be the reason was none."""
        now = self._now
        if now.paused and notice.said in UNPAUSED:
            return True
        match notice.said:
            case "paused":
                return now.paused is False
            case "cooling":
                # Time does what is due in its order, and may be late. What cools for no time at
                # all cools to the end of its batch.
                due = notice.cause.partition("tick/")[2]
                return now.cools is not None and now.cools < (utc(due) if due else notice.at)
            case "attempts_exhausted" if now.methods is not None:
                methods = now.methods or [""]
                return any(self._is_worn(one, notice.at) is False for one in methods)
        return False

    def _requested(self, notice: Notice) -> Iterator[str]:
        now, request = self._now, self._requests.get(str(notice.asked))
        if request is None or request["epoch"] is None:
            # That it is not there is asked elsewhere.
            now.forget(notice.at)
            return
        again = request["attempt"] > 1
        wrong = self._not_yet(notice.at, again=again)
        first = now.place if again else 0
        place = None
        if first is not None and now.methods is not None:
            place = self._first_of(range(first, first + max(1, len(now.methods))), notice.at)
        if not wrong and place is not None and "payment_method" in request:
            found = request["payment_method"]
            right = now.methods[place] if now.methods and place != _NONE_LEFT else None
            if place == _NONE_LEFT:
                wrong = "is made though every payment method was declined too often"
            elif found != right:
                wrong = f"asks {found}, though {right} is next"
        if wrong:
            yield f"request {notice.asked} of {self._tenant} {wrong}"
        now.place = None if place == _NONE_LEFT else place
        now.rounds = now.rounds if again else 0
        now.last, now.waits, now.paused, now.again = notice.asked, True, False, False
        now.cools = EVER
        now.begun, now.cause = notice.at, notice.cause
        now.had = nanos(request["balance"]) if "balance" in request else None
        now.versions, now.over = [request.get("policy_version")], False

    def _not_yet(self, at: datetime, *, again: bool) -> str:
        """What is wrong with asking at an instant; nothing when it is time to."""
        now = self._now
        if now.paused:
            return "is made while recharges are paused"
        if again and now.again and now.cools is not None and at < now.cools:
            return f"is made in the back-off until {now.cools.isoformat()}"
        if not again and now.again and not self.may_be_over(at):
            return "begins an epoch, though nothing has ended the one before"
        return ""

    # whether money has ended an epoch

    def _money_came(self, at: datetime) -> bool:
        """Whether money may have ended the epoch while its request was in flight."""
        now = self._now
        if now.last is None or now.had is None or now.over:
            return True
        return any(balance > now.had and self._enough(balance) for balance in self._since(at))

    def may_be_over(self, at: datetime) -> bool:
        """Whether the balance may have been there again since the last request."""
        now = self._now
        if now.again is not True and not now.waits:
            return False
        if now.waits:
            return self._money_came(at)
        if now.last is None or now.had is None or now.over:
            return True
        return any(self._enough(balance) for balance in (now.had, *self._since(at)))

    def _enough(self, balance: int) -> bool:
        """Whether a balance may be enough by one of the policies that were in force."""
        policies = map(self._policy, self._now.versions)
        return any(policy is None or not policy.below(balance) for policy in policies)

    def _since(self, at: datetime) -> Iterator[int]:
        """The balances from the last request until an instant. What open calls hold makes them
        smaller, never larger."""
        now = self._now
        first = bisect_left(self._entries, now.begun, key=lambda one: one.booked_at)
        last = bisect_right(self._entries, at, key=lambda one: one.booked_at)
        found = self._entries[first:last]
        # All that is decided at once has one instant. A request comes after what its own cause has
        # booked; time has one name for all that is due at an instant.
        own = [
            place
            for place, one in enumerate(found)
            if one.booked_at == now.begun
            and one.cause == now.cause
            and not now.cause.startswith("tick/")
        ]
        return (one.balance for one in found[max(own, default=-1) + 1 :])


def _try_of(request: Mapping[str, Any]) -> tuple[int, int]:
    return request["epoch"], request["attempt"]


def _when(at: datetime | None) -> str:
    return "at once" if at is None else f"at {at.isoformat()}"
