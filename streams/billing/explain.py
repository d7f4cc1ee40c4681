"""Explanations: why an entry has its amount, why money was asked for, and why it was not.

Only what the outcome itself said is told again: the entry, the notice with its guards. Nothing is
worked out anew, so an explanation cannot disagree with what was booked.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec import Struct

from schemas.ledger import EntryKind
from schemas.notices import NoticeKind, Withheld

# What a guard says when it lets a recharge pass, and when it holds it back.
SENTENCES: Final[dict[Withheld, tuple[str, str]]] = {
    Withheld.DISABLED: ("auto-recharge is on", "auto-recharge is off"),
    Withheld.ABOVE_TRIGGER: (
        "{found} is available, short of the trigger of {limit}",
        "{found} is available and the trigger is {limit}: nothing is missing",
    ),
    Withheld.IN_FLIGHT: (
        "no other request is in flight",
        "request {found} is in flight and has no answer yet",
    ),
    Withheld.STALE: (
        "the balance was up to date",
        "the balance may have been an old one: the worker was more than a minute behind",
    ),
    Withheld.PAUSED: (
        "auto-recharge is not paused",
        "auto-recharge is paused until money comes or a payment method is added",
    ),
    Withheld.COOLING: ("no cooldown or back-off runs", "it is too early: wait until {limit}"),
    Withheld.ATTEMPTS_EXHAUSTED: (
        "the payment method was declined {found} times in 30 days, fewer than {limit}",
        "the payment method was declined {found} times in 30 days; {limit} are the most",
    ),
    Withheld.DAILY_COUNT: (
        "{found} recharges in 24 hours, fewer than {limit}",
        "{found} recharges in 24 hours; {limit} are the most",
    ),
    Withheld.DAILY_AMOUNT: (
        "{found} in 24 hours together with this one, within the cap of {limit}",
        "{found} in 24 hours together with this one, above the cap of {limit}",
    ),
    Withheld.WEEKLY_AMOUNT: (
        "{found} in 7 days together with this one, within the cap of {limit}",
        "{found} in 7 days together with this one, above the cap of {limit}",
    ),
    Withheld.MONTHLY_AMOUNT: (
        "{found} in 30 days together with this one, within the cap of {limit}",
        "{found} in 30 days together with this one, above the cap of {limit}",
    ),
    Withheld.VELOCITY: (
        "{found} spent on a risk class in 24 hours, within its limit of {limit}",
        "{found} spent on a risk class in 24 hours, its limit is {limit}: a person must approve",
    ),
    Withheld.ABOVE_MAX: (
        "{found} is within {limit}, the most of one request",
        "{found} is above {limit}, the most of one request",
    ),
}
# Guards that have no limit unless the policy sets one.
_NO_LIMIT: Final = "no limit is set"
_OPTIONAL: Final = frozenset(
    {
        Withheld.DAILY_AMOUNT,
        Withheld.WEEKLY_AMOUNT,
        Withheld.MONTHLY_AMOUNT,
        Withheld.VELOCITY,
    }
)

_STORY: Final = {
    NoticeKind.RECHARGE_SUCCEEDED: "paid: {amount} by payment {payment_id}",
    NoticeKind.RECHARGE_DECLINED: "declined ({decline_code})",
    NoticeKind.RECHARGE_NEEDS_ACTION: "waits for a person at the payment service",
    NoticeKind.RECHARGE_ENDED: "ended at the payment service without money",
    NoticeKind.RECHARGE_OVERDUE: "no answer in time: asked again under the same id",
    NoticeKind.RECHARGE_UNRESOLVED: "no answer for a day: a person must decide",
    NoticeKind.RECHARGE_RESOLVED: "a person has decided: {rule}",
    NoticeKind.RECHARGE_UNNEEDED: "a correction shows that it was not needed; it stands",
    NoticeKind.RECHARGE_PAUSED: "auto-recharge paused ({rule})",
    NoticeKind.ORPHAN_PAYMENT: "paid: {amount} by payment {payment_id}, for no request we know",
}
_DECISIONS: Final = frozenset({NoticeKind.RECHARGE_REQUESTED, NoticeKind.RECHARGE_WITHHELD})
_EXPOSED: Final = "{exposure} of the balance of {balance} is held for open calls"
# Members that the sentences of an entry tell; whatever else one carries is told by its name.
_TOLD: Final = frozenset(
    {
        *("tenant_id", "seq", "kind", "amount", "currency", "balance_after", "at", "booked_at"),
        *("caused_by", "overdraft_after", "grants", "rate", "late", "duration_disagrees", "hash"),
        "links",
        "pools",
    }
)
_RATE_TOLD: Final = frozenset(
    {
        *("deck", "version", "prefix", "per_minute", "connect_fee", "initial_increment_s"),
        *("increment_s", "billed_s", "duration_s"),
    }
)


class Explanation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer: what it is about, why in one sentence, the record it came from, and all that
    was considered, in order."""

    about: str
    tenant_id: str
    at: str
    why: str
    caused_by: str
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    considered: list[str]


class _Blank(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "–"


def entry(booked: Mapping[str, Any], others: Iterable[Mapping[str, Any]] = ()) -> Explanation:
    """Why a ledger entry has its amount; `booked` is the entry as it was published, `others` are
    its tenant's entries, among which those that a correction has linked with it are found."""
    amount, currency = booked["amount"], booked["currency"]
    rate = booked.get("rate")
    considered: list[str] = []
    pools = booked.get("pools", ())
    taken = minutes_of(pools)
    if booked["kind"] == EntryKind.POOL:
        why = f"{_minutes(taken, 'included ')} paid all of it"
    elif rate is None:
        why = _without_rate(booked)
    else:
        why = (
            f"{rate['billed_s']} s at {rate['per_minute']} a minute and a fee of "
            f"{rate['connect_fee']} come to {amount.removeprefix('-')} {currency}"
        )
        if pools:
            why = f"included: {_minutes(taken)}; the other {why}"
    considered += [pool(one) for one in pools]
    if rate is not None:
        considered.append(
            f"deck {rate['deck']}, version {rate['version']}: the row of prefix {rate['prefix']}"
        )
        if booked["kind"] != EntryKind.POOL:
            considered.append(
                f"increments {rate['initial_increment_s']}/{rate['increment_s']}: "
                f"{max(0, rate['duration_s'] - 60 * taken)} s are billed as {rate['billed_s']} s"
            )
        considered += [f"rate {name}: {rate[name]}" for name in rate if name not in _RATE_TOLD]
    if booked["kind"] == EntryKind.ORPHAN:
        why += ", for no request we know"
    considered += _links(booked, others)
    considered += [
        f"{name}: {value}" for name, value in booked.items() if name not in _TOLD and value
    ]
    if booked.get("late"):
        considered.append("late: it ended more than 48 hours before it was booked")
    if booked.get("duration_disagrees"):
        considered.append("its times contradict its duration; the duration counts")
    for used in booked.get("grants", ()):
        gave = used["amount"].startswith("-")
        verb = "gave" if gave else "got"
        moved = used["amount"].removeprefix("-")
        considered.append(f"lot {used['id']} {verb} {moved}, {used['left']} left in it")
    overdraft = booked.get("overdraft_after", "0")
    if overdraft != "0":
        considered.append(f"no lot could pay the rest: overdrawn by {overdraft}")
    considered.append(f"balance after it: {booked['balance_after']} {currency}")
    cause = booked["caused_by"]
    return Explanation(
        about=f"entry {booked['seq']}",
        tenant_id=booked["tenant_id"],
        at=booked["booked_at"],
        why=why,
        caused_by=f"{cause['source']}/{cause['id']}",
        topic=cause["topic"],
        partition=cause["partition"],
        offset=cause["offset"],
        considered=considered,
    )


# What moved money without a rate, where the kind and the amount alone would not say it.
_MOVED: Final = {
    EntryKind.EXPIRY: "a lot has expired, and {amount} {currency} were left in it",
    EntryKind.EXPIRY_REOPENED: (
        "usage of before a lot's expiry came late: {amount} {currency} of the lot come back for it"
    ),
    EntryKind.VOID: "a lot was voided, and {amount} {currency} were left in it",
    EntryKind.REVERSAL: "a correction gives back {amount} {currency}",
}


def _without_rate(booked: Mapping[str, Any]) -> str:
    """Why an entry that no rate priced moved its amount."""
    kind, amount, currency = booked["kind"], booked["amount"], booked["currency"]
    if kind not in _MOVED:
        return f"{kind} of {amount} {currency}"
    given_back = -minutes_of(booked.get("pools", ()))
    if given_back and amount == "0":
        return f"a correction gives back {_minutes(given_back, 'included ')}"
    moved = _MOVED[kind].format(amount=amount.removeprefix("-"), currency=currency)
    return f"{moved} and {_minutes(given_back, 'included ')}" if given_back else moved


def _minutes(count: int, what: str = "") -> str:
    return f"{count} {what}minute{'' if count == 1 else 's'}"


def _links(booked: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """What an entry has to do with a correction, told from either side, and with the others that
    the same record brought about."""
    seq, links = booked["seq"], booked.get("links")
    told: list[str] = []
    if links is not None:
        wrong = f"{booked['caused_by']['source']}/{links['corrects']}"
        at = f", entry {links['entry']}" if "entry" in links else ", which had cost nothing"
        verb = "takes back" if booked["kind"] == EntryKind.REVERSAL else "stands in place of"
        told.append(f"correction: {verb} what {wrong} had caused{at}")
    for other in others:
        if other["seq"] == seq:
            continue
        cause = other["caused_by"]
        if other.get("links", {}).get("entry") == seq:
            verb = "taken back" if other["kind"] == EntryKind.REVERSAL else "replaced"
            told.append(f"{verb} by entry {other['seq']}: {cause['source']}/{cause['id']}")
        elif cause == booked["caused_by"]:
            told.append(f"together with entry {other['seq']}: {other['kind']}")
    return told


def minutes_of(pools: Iterable[Mapping[str, Any]]) -> int:
    """How many included minutes an entry took; below zero: gave back."""
    return sum(int(one["minutes"]) for one in pools)


def pool(used: Mapping[str, Any]) -> str:
    """What an entry took of a pool, or gave back, as a sentence."""
    minutes = used["minutes"]
    verb = "gave" if minutes >= 0 else "got back"
    included = f" of {used['included']}" if "included" in used else ""
    return (
        f"pool {used['pool']} {verb} {_minutes(abs(minutes))} of {used['month']}; "
        f"used after it: {used['used']}{included}"
    )


def guard(asked: Mapping[str, Any]) -> str:
    """One guard's answer as a sentence; one that a newer version asked is told by its name."""
    name, holds = asked["guard"], asked["holds"]
    known = name in set(Withheld)
    if not known:
        return f"{name}: {'holds' if holds else 'passes'}"
    if name in _OPTIONAL and asked.get("limit") is None and not holds:
        return f"{name}: {asked.get('found') or _NO_LIMIT}"
    sentence = SENTENCES[Withheld(name)][holds]
    if name == Withheld.DISABLED and asked.get("found") == "closed":
        sentence = "the account is closed"
    return f"{name}: {sentence.format_map(_Blank(asked))}"


def decision(notice: Mapping[str, Any]) -> Explanation:
    """Why a recharge was requested or withheld, by the guards in the order they were asked."""
    guards = [guard(one) for one in notice.get("guards", ())]
    if notice["notice"] == NoticeKind.RECHARGE_WITHHELD:
        about = f"withheld: {notice['withheld']}"
        why = guards[-1] if guards else notice["withheld"]
        if notice.get("retry_at"):
            guards.append(f"asked again at {notice['retry_at']} at the latest")
    else:
        about = f"recharge {notice['recharge_id']}"
        why = f"{notice['amount']} asked for: every guard let it pass"
        guards += [
            f"{name}: {notice[name]}"
            for name in ("reason", "epoch", "attempt", "payment_method", "policy_version")
            if notice.get(name) is not None
        ]
    exposed = []
    if notice.get("exposure"):
        exposed = [_EXPOSED.format_map(_Blank(notice))]
    return Explanation(
        about=about,
        tenant_id=notice["tenant_id"],
        at=notice["at"],
        why=why,
        caused_by=notice["caused_by"],
        considered=[*exposed, *guards],
    )


def recharge(
    recharge_id: str, notices: Iterable[Mapping[str, Any]], entries: Iterable[Mapping[str, Any]]
) -> Explanation | None:
    """The story of one recharge: why it was asked for, every answer, every entry. None when
    neither a notice nor an entry names it."""
    told = [one for one in notices if one.get("recharge_id") == recharge_id]
    booked = [one for one in entries if one.get("recharge_id") == recharge_id]
    asked = next((one for one in told if one["notice"] in _DECISIONS), None)
    if not told and not booked:
        return None
    story = [
        f"{one['at']} {_STORY[kind].format_map(_Blank(one))}"
        for one in told
        if (kind := _kind(one)) in _STORY
    ]
    story += [
        f"{one['booked_at']} entry {one['seq']}: {one['kind']} of {one['amount']} {one['currency']}"
        for one in booked
    ]
    if asked is not None:
        begun = decision(asked)
        return Explanation(
            about=begun.about,
            tenant_id=begun.tenant_id,
            at=begun.at,
            why=begun.why,
            caused_by=begun.caused_by,
            considered=[*begun.considered, *sorted(story)],
        )
    first = (told or booked)[0]
    cause = first["caused_by"]
    return Explanation(
        about=f"recharge {recharge_id}",
        tenant_id=first["tenant_id"],
        at=first.get("at", ""),
        why="funding by hand, or asked for longer ago than notices are kept",
        caused_by=cause if isinstance(cause, str) else f"{cause['source']}/{cause['id']}",
        considered=sorted(story),
    )


def _kind(notice: Mapping[str, Any]) -> NoticeKind | None:
    try:
        return NoticeKind(notice["notice"])
    except ValueError:
        return None  # a newer version's


def last_decision(notices: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The latest notice that says why a tenant was or was not recharged."""
    last = None
    for one in notices:
        if one["notice"] in _DECISIONS:
            last = one
    return last
