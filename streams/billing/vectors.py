"""Golden cases: users' own files, run through the functions that book real events.

A case that needs what this build does not support is skipped and says what is missing; one that
cannot be read fails alone. What a case does not name among its needs does not decide it.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import ceil, lcm
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas.commands import Compare, Method
from schemas.nanos import NANOS, text_from
from streams.billing import granting, grants, rating, recharge
from streams.billing.account import Account, account_from
from streams.billing.coverage import digits_of
from streams.billing.outcomes import Burnt
from streams.billing.parts import AccountRow, Grant, LotKind, Policy
from streams.billing.rates import Rate, Rounding, Special, Step, Tariff, by_prefix
from streams.billing.tariff import DeckError, parse_deck, scaled
from streams.billing.windows import window_from

SCHEMA_VERSION: Final = 1
SUPPORTED: Final = frozenset(
    {
        # rating
        "session_continuation",
        "stepped_price",
        "time_of_day_bands",
        "time_of_day_split",
        "calendar_bands",
        "minute_pool",
        "max_cost",
        "fractional_seconds",
        # grants
        "overage_carries_to_next_grant",
        "void",
        "promo_before_paid",
        "tie_break_by_id",
        "recurrence",
        "reset_rollover",
        # recharge
        "compare_le",
        "gap_plus_amount",
        "amount_limits",
        "policy_validation",
        "doubling_backoff",
        "shortfall_net_of_pending",
        "fixed_multiple_past",
        "free_credits",
        "balance_driven_retry",
        "change_gating",
        "rule_expiry",
        "burst_report",
        # e164
        "reject_non_e164",
    }
)


class VectorError(Exception):
    """The file is no golden-case file this build can read; the text says why."""


class CaseResult(Struct, frozen=True, kw_only=True):
    """What became of one case."""

    id: str
    status: str
    expected: Any = None
    got: Any = None
    missing: tuple[str, ...] = ()


def run_file(document: Any, *, deck_text: str | None = None) -> list[CaseResult]:
    """Run every case of a file. `deck_text` is the deck for e164 cases.

    A case that cannot be read is a failed one, its `got` says why. Raises VectorError when the
    file itself makes no sense.
    """
    if not isinstance(document, dict) or not isinstance(document.get("cases"), list):
        raise VectorError("a golden-case file is an object with a list named cases")
    if document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise VectorError(f"schema_version {document['schema_version']} is not supported")
    tariff = None
    if deck_text is not None:
        try:
            tariff = parse_deck(deck_text, deck="vectors", version="vectors")
        except DeckError as error:
            raise VectorError(f"the deck cannot be used: {error}") from None
    return [_run_case(case, document.get("kind"), tariff) for case in document["cases"]]


def _run_case(case: Any, kind: str | None, tariff: Tariff | None) -> CaseResult:
    name = str(case.get("id", "")) if isinstance(case, dict) else ""
    try:
        missing = tuple(sorted(_needs(case) - SUPPORTED))
        if missing:
            return CaseResult(id=name, status="skipped", missing=missing)
        run = _RUNNERS.get(kind or _kind_of(case))
        if run is None:
            raise ValueError(f"its kind is none of {', '.join(_RUNNERS)}")
        expected, got = run(case, tariff)
    except KeyError as error:
        return CaseResult(id=name, status="fail", got={"unreadable": f"{error} is missing"})
    # Whatever shape a hand-written case has: the functions behind check values, not JSON.
    except (ValueError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        return CaseResult(id=name, status="fail", got={"unreadable": str(error)})
    return CaseResult(
        id=name,
        status="pass" if expected == got else "fail",
        expected=_plain(expected),
        got=_plain(got),
    )


def _kind_of(case: dict[str, Any]) -> str:
    for kind, member in (
        ("rating", "rates"),
        ("grants", "grants"),
        ("recharge", "policy"),
        ("e164", "number"),
    ):
        if member in case:
            return kind
    return ""


def _plain(value: Any) -> Any:
    """Values as a file would write them."""
    if isinstance(value, Fraction):
        nanos = value * NANOS
        return text_from(nanos.numerator) if nanos.denominator == 1 else str(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def _value(text: Any) -> Fraction:
    """A decimal string or whole number, exactly."""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ValueError(f"{text!r} is no decimal text")
    return Fraction(text)


def _nanos(text: Any) -> int:
    value = _value(text) * NANOS
    if value.denominator != 1:
        raise ValueError(f"{text!r} has more than nine decimals")
    return value.numerator


def _needs(case: dict[str, Any]) -> set[str]:
    return set(case.get("needs") or ())


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


# -- rating ------------------------------------------------------------------------------------


# Any of these lets a row's windows count.
_WINDOWS: Final = frozenset({"time_of_day_bands", "time_of_day_split", "calendar_bands"})


def _rating(case: dict[str, Any], _: Tariff | None) -> tuple[Any, Any]:
    needs = _needs(case)
    wanted_cost = case.get("expected_cost")
    expected: dict[str, Any] = {
        "prefix": case.get("expected_prefix"),
        "cost": None if wanted_cost is None else _value(wanted_cost),
    }
    duration_s = _value(case["duration_s"])
    # Seconds may be broken: then everything counts in the largest part that is in all of them.
    per_second = _per_second(case, duration_s) if "fractional_seconds" in needs else 1
    scale = max([9, *(_decimals(row) for row in case["rates"])])
    rates = [_rate(row, case, needs, scale, per_second) for row in case["rates"]]
    # Without windows nothing tells rows of one prefix apart: the last one stands.
    by = by_prefix(rates) if needs & _WINDOWS else {rate.prefix: rate for rate in rates}
    tariff = Tariff("vectors", "vectors", by)
    duration = ceil(duration_s * per_second)
    started_at = _at(case["started_at"]) if case.get("started_at") else _SOME_DAY
    destination = str(case["destination"])
    begin = 0
    left: dict[str, Fraction] = {}
    if "minute_pool" in needs:
        found = tariff.find_at(destination, started_at)
        begin, left = _pools(case, 0 if found is None else duration, per_second)
    cost = rating.exact_special(
        tariff, destination, started_at, duration, per_second=per_second, begin=begin
    )
    got: dict[str, Any] = {"prefix": None, "cost": None}
    if cost is not None:
        amount = Fraction(cost.numerator, cost.denominator)
        rule = cost.rate.rounding
        if rule is not None:
            whole = rating.rounded(cost.numerator, cost.denominator, rule)
            amount = Fraction(whole, 10**rule.decimals)
        got = {"prefix": cost.rate.prefix, "cost": amount}
    if "minute_pool" in needs and case.get("expected_pool_left_s") is not None:
        wanted = case["expected_pool_left_s"]
        expected["pool_left_s"] = {name: _value(text) for name, text in wanted.items()}
        got["pool_left_s"] = {name: left.get(name) for name in wanted}
    return expected, got


_SOME_DAY: Final = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)


def _decimals(row: dict[str, Any]) -> int:
    texts = [row.get("per_minute"), row.get("connect_fee")]
    texts += [step["per_minute"] for step in row.get("steps") or ()]
    texts.append((row.get("max_cost") or {}).get("amount"))
    return max(len(str(text or 0).partition(".")[2]) for text in texts)


def _per_second(case: dict[str, Any], duration_s: Fraction) -> int:
    """Into how many parts a second is cut, so that all durations of the case are whole."""
    seconds = [duration_s]
    for row in case["rates"]:
        seconds += [_value(row.get(name) or 0) for name in ("initial_increment_s", "increment_s")]
        for step in row.get("steps") or ():
            seconds += [_value(step["from_s"]), _value(step["increment_s"])]
    for pool in case.get("pools") or ():
        seconds += [_value(pool["seconds"]), _value(pool["increment_s"])]
    return lcm(*(one.denominator for one in seconds))


def _pools(case: dict[str, Any], duration: int, per_second: int) -> tuple[int, dict[str, Fraction]]:
    """How much of a call the pools pay for, and what is left in each."""
    covered = 0
    left: dict[str, Fraction] = {}
    for pool in sorted(case.get("pools") or (), key=lambda one: int(one.get("order") or 0)):
        has = int(_value(pool["seconds"]) * per_second)
        block = _parts(pool, "increment_s", 1, per_second)
        taken = rating.take_minutes(max(0, duration - covered), has, block)
        covered += taken
        left[pool["id"]] = _value(pool["seconds"]) - Fraction(taken, per_second)
    return covered, left


def _rate(
    row: dict[str, Any], case: dict[str, Any], needs: set[str], scale: int, per_second: int
) -> Rate:
    rule = row.get("rounding")
    fee = str(row.get("connect_fee") or "0")
    free = case.get("continuation") and "session_continuation" in needs
    return Rate(
        prefix=row["prefix"],
        per_minute=scaled(str(row.get("per_minute") or "0"), scale),
        connect_fee=0 if free else scaled(fee, scale),
        scale=scale,
        initial_increment_s=_parts(row, "initial_increment_s", 0, per_second),
        increment_s=_parts(row, "increment_s", 1, per_second),
        rounding=None if rule is None else Rounding(rule["mode"], int(rule["decimals"])),
        special=_special(row, case, needs, scale, per_second),
    )


def _special(
    row: dict[str, Any], case: dict[str, Any], needs: set[str], scale: int, per_second: int
) -> Special:
    steps: list[Step] = []
    if "stepped_price" in needs:
        for step in sorted(row.get("steps") or (), key=lambda one: _value(one["from_s"])):
            from_s = int(_value(step["from_s"]) * per_second)
            price = scaled(str(step["per_minute"]), scale)
            steps.append(Step(from_s, price, _parts(step, "increment_s", 1, per_second)))
    windows = (row.get("windows") or ()) if needs & _WINDOWS else ()
    most = row.get("max_cost") or case.get("max_cost")
    clips = "max_cost" in needs and most and most.get("strategy", "free") == "free"
    return Special(
        steps=tuple(steps),
        windows=tuple(
            window_from(
                tuple(int(day) for day in window.get("days") or ()),
                window.get("from") or "",
                window.get("to") or "",
                str(window.get("month_day") or ""),
            )
            for window in windows
        ),
        weight=int(row.get("weight") or 0),
        split="time_of_day_split" in needs,
        max_cost=scaled(str(most["amount"]), scale) if clips and most is not None else None,
    )


def _parts(row: dict[str, Any], name: str, least: int, per_second: int) -> int:
    """Whole parts of a second, a minute when the row does not say; an initial 0 means none of
    its own."""
    value = row.get(name)
    seconds = Fraction(60) if value is None else _value(value)
    parts = seconds * per_second
    if parts < least or parts.denominator != 1:
        raise ValueError(f"{name} is {value}; write whole seconds, at least {least}")
    return parts.numerator


# -- grants ------------------------------------------------------------------------------------


# What happens at one instant, in this order.
_VOID: Final = 0
_RESET: Final = 1
_BEGIN: Final = 2
_USE: Final = 3


def _grants(case: dict[str, Any], _: Tariff | None) -> tuple[Any, Any]:
    at = _at(case["at"])
    account = account_from(
        AccountRow(tenant_id="vector", currency="USD", opened_at=at, billing_from=at)
    )
    needs = _needs(case)
    wires = {str(one["id"]): one for one in case["grants"]}
    lots = {name: _lot(one, needs) for name, one in wires.items()}
    steps: list[tuple[datetime, int, int, Any]] = []
    # What begins together pays an open overage in burn order.
    for number, lot in enumerate(grants.ordered(lots.values())):
        voided_at = _voided_at(wires[lot.id], needs)
        begins = [lot.effective_at, *_recurrences(wires[lot.id], lot, at, needs)]
        steps += [
            (instant, _BEGIN, number, lot)
            for instant in begins
            if voided_at is None or instant < voided_at
        ]
        if voided_at is not None:
            steps.append((voided_at, _VOID, number, lot.id))
    if "reset_rollover" in needs:
        steps += [(_at(one["at"]), _RESET, 0, one) for one in case.get("resets") or ()]
    steps += [(_at(one["at"]), _USE, 0, _nanos(one["amount"])) for one in case.get("usage") or ()]
    for instant, rank, _number, what in sorted(steps, key=lambda step: step[:3]):
        # Money that begins at the read time counts; usage at it does not.
        if instant > at or (rank == _USE and instant == at):
            continue
        if rank == _BEGIN:
            burnt, _grown = grants.set_back(account, what)
        elif rank == _VOID:
            kept = tuple(grant for grant in account.grants if grant.id != what)
            burnt = Burnt(kept, account.overdraft_nanos, ())
        elif rank == _RESET:
            burnt = _reset(account, what, wires, lots, instant, needs)
        else:
            burnt = grants.burn(account, what, instant, instant)
        account = account.changed(grants=burnt.grants, overdraft_nanos=burnt.overdraft_nanos)
    left = {grant.id: grant.left_nanos for grant in account.grants if grants.active(grant, at)}
    got: dict[str, Any] = {
        "grants": {one["id"]: Fraction(left.get(one["id"], 0), NANOS) for one in case["grants"]}
    }
    expected: dict[str, Any] = {
        "grants": {name: _value(text) for name, text in case["expected"].items()}
    }
    got["grants"] = {name: got["grants"][name] for name in expected["grants"]}
    if "expected_overage" in case:
        expected["overage"] = _value(case["expected_overage"])
        got["overage"] = Fraction(account.overdraft_nanos, NANOS)
    if "expected_total" in case:
        expected["total"] = _value(case["expected_total"])
        got["total"] = Fraction(sum(left.values()), NANOS)
    return expected, got


def _lot(one: dict[str, Any], needs: set[str]) -> Grant:
    amount_nanos = _nanos(one["amount"])
    effective_at = _at(one["effective_at"])
    kind = LotKind[one.get("kind", "paid").upper()]
    return Grant(
        id=str(one["id"]),
        kind=kind if "promo_before_paid" in needs else LotKind.PAID,
        priority=int(one.get("priority", 0)),
        amount_nanos=amount_nanos,
        left_nanos=amount_nanos,
        effective_at=effective_at,
        expires_at=None if one.get("expires_at") is None else _at(one["expires_at"]),
        created_at=_at(one.get("created_at") or one["effective_at"]),
    )


def _voided_at(one: dict[str, Any], needs: set[str]) -> datetime | None:
    return _at(one["voided_at"]) if one.get("voided_at") and "void" in needs else None


def _recurrences(
    one: dict[str, Any], lot: Grant, until: datetime, needs: set[str]
) -> Iterator[datetime]:
    """When a lot is set back to its amount within its life, after its beginning."""
    wire = one.get("recurrence")
    if not wire or "recurrence" not in needs:
        return
    every_days = int(wire["every_days"])
    if every_days < 1:
        raise ValueError(f"every_days is {every_days}; write at least 1")
    anchor = _at(wire.get("anchor") or one["effective_at"])
    at = granting.next_day(anchor, every_days, lot.effective_at)
    while at <= until and (lot.expires_at is None or at < lot.expires_at):
        yield at
        at = granting.next_day(anchor, every_days, at)


def _reset(
    account: Account,
    reset: dict[str, Any],
    wires: dict[str, dict[str, Any]],
    lots: dict[str, Grant],
    at: datetime,
    needs: set[str],
) -> Burnt:
    """A period ends: every active lot keeps what its limits say; then an open overage is dropped,
    or paid from the result."""
    left = {lot.id: lot.left_nanos for lot in account.grants}
    kept = []
    for name, lot in lots.items():
        wire = wires[name]
        voided_at = _voided_at(wire, needs)
        # What begins at this instant has not begun before it.
        begun = lot.effective_at < at and (voided_at is None or at < voided_at)
        if not begun or not grants.active(lot, at):
            continue
        least = _nanos(wire.get("rollover_min") or 0)
        most = None if wire.get("rollover_max") is None else _nanos(wire["rollover_max"])
        left_nanos = grants.rolled_over(left.get(name, 0), least, most)
        if left_nanos:
            kept.append(msgspec.structs.replace(lot, left_nanos=left_nanos))
    open_nanos = account.overdraft_nanos if reset.get("preserve_overage") else 0
    period = account.changed(grants=grants.ordered(kept), overdraft_nanos=0)
    return grants.burn(period, open_nanos, at, at) if open_nanos else Burnt(period.grants, 0, ())


# -- recharge ----------------------------------------------------------------------------------


def _recharge(case: dict[str, Any], _: Tariff | None) -> tuple[Any, Any]:
    expected: dict[str, Any] = {
        "request": None
        if case["expected"].get("request") is None
        else _value(case["expected"]["request"]),
        "reason": case["expected"].get("reason"),
    }
    amount, reason = _decide(case)
    got: dict[str, Any] = {"request": amount, "reason": reason}
    if "burst_report" in _needs(case):
        expected["flags"] = case["expected"].get("flags") or []
        got["flags"] = ["burst"] if _burst(case.get("history") or ()) else []
    return expected, got


def _policy(wire: dict[str, Any], needs: set[str]) -> Policy:
    limits = "amount_limits" in needs and not wire.get("ignore_limits")

    def limit(name: str) -> int | None:
        return _nanos(wire[name]) if limits and wire.get(name) is not None else None

    method = str(wire.get("method", "fixed")).removesuffix("_past")
    return Policy(
        enabled=True,
        trigger_nanos=_nanos(wire.get("trigger", 0)),
        compare=Compare(wire.get("compare", "lt")) if "compare_le" in needs else Compare.LT,
        method=Method(method),
        amount_nanos=_nanos(wire.get("amount") or 0),
        target_nanos=_nanos(wire.get("target") or 0),
        min_nanos=limit("min_amount"),
        max_nanos=limit("max_amount"),
    )


def _decide(case: dict[str, Any]) -> tuple[Fraction | None, str]:
    wire, state = case["policy"], case["state"]
    needs = _needs(case)
    policy = _policy(wire, needs)
    if "rule_expiry" in needs and state.get("rule_expired"):
        return None, "rule_expired"
    target = policy.method is Method.TARGET
    if target and "policy_validation" in needs and policy.target_nanos < policy.trigger_nanos:
        return None, "policy_rejected"
    balance_nanos = _nanos(state["balance"])
    pending_nanos = sum(_nanos(one["amount"]) for one in case.get("pending") or ())
    if not recharge.below_trigger(policy, balance_nanos):
        return None, "above_trigger"
    if "change_gating" in needs and not _changed(state):
        return None, "state_unchanged"
    if wire.get("one_in_flight"):
        if case.get("pending"):
            return None, "in_flight"
    elif pending_nanos and not recharge.below_trigger(policy, balance_nanos + pending_nanos):
        return None, "pending_covers"
    held = _held_back(wire, case.get("history") or (), needs, balance_nanos)
    if held is not None:
        return None, held
    if not target and not policy.amount_nanos:
        return None, "nothing_to_pay"
    netted_nanos = pending_nanos if "shortfall_net_of_pending" in needs else 0
    seen_nanos = balance_nanos + netted_nanos
    if wire.get("method") == "fixed_multiple_past" and "fixed_multiple_past" in needs:
        free_nanos = _nanos(wire.get("free_credits") or 0) if "free_credits" in needs else 0
        # As if the trigger were hit at its next nano: the result has to lie above it.
        policy = msgspec.structs.replace(policy, trigger_nanos=policy.trigger_nanos + 1)
        seen_nanos = balance_nanos + pending_nanos + free_nanos
    amount_nanos = recharge.wanted(policy, seen_nanos, "USD")
    if amount_nanos <= 0:
        return None, "target_reached" if target else "nothing_to_pay"
    for period in ("day", "week", "month"):
        cap = (wire.get("caps") or {}).get(period)
        spent = (state.get("spent") or {}).get(period, 0)
        if cap is not None and _nanos(spent) + amount_nanos > _nanos(cap):
            return None, f"cap_{period}"
    return Fraction(amount_nanos, NANOS), "below_trigger"


def _changed(state: dict[str, Any]) -> bool:
    """Whether anything has changed since the policy was asked last."""
    if state.get("changed") is not None:
        return bool(state["changed"])
    before = state.get("previous_balance")
    return before is None or _nanos(before) != _nanos(state["balance"])


def _burst(history: Any) -> bool:
    """Three or more payments within ten minutes: told, and nothing is held back for it."""
    settled = [one for one in history if one["kind"] == "settled" and int(one["ago_s"]) <= 600]
    return len(settled) >= 3


def _waits(wire: dict[str, Any], declines: int, balance_nanos: int) -> str | None:
    """Retries driven by the balance: after the n-th decline it must have fallen to a percentage
    of the trigger; when there is no percentage left, nothing is tried any more."""
    percents = wire.get("retry_at_percent")
    if not percents or not declines:
        return None
    if declines > len(percents):
        return "disabled"
    level = Fraction(str(percents[declines - 1])) * _nanos(wire.get("trigger", 0)) / 100
    return "waiting_lower_balance" if balance_nanos > level else None


def _held_back(
    wire: dict[str, Any], history: Any, needs: set[str], balance_nanos: int
) -> str | None:
    """Guards that look at what happened before, `disabled` first."""
    settled = [one for one in history if one["kind"] == "settled"]
    run = []
    for one in sorted(history, key=lambda one: int(one["ago_s"])):
        if one["kind"] == "settled":
            break
        if one["kind"] == "declined" and one.get("source", "auto") == "auto":
            run.append(one)
    if wire.get("disable_after_declines") and len(run) >= int(wire["disable_after_declines"]):
        return "disabled"
    waits = _waits(wire, len(run), balance_nanos) if "balance_driven_retry" in needs else None
    if waits == "disabled":
        return waits
    automatic = [one for one in settled if one.get("source", "auto") == "auto"]
    if wire.get("cooldown_s") and any(
        int(one["ago_s"]) < int(wire["cooldown_s"]) for one in automatic
    ):
        return "cooldown"
    if wire.get("decline_backoff_s") and run:
        backoff = timedelta(seconds=int(wire["decline_backoff_s"]))
        if wire.get("backoff") == "doubling" and "doubling_backoff" in needs:
            backoff *= 2 ** (len(run) - 1)
        if timedelta(seconds=int(run[0]["ago_s"])) < backoff:
            return "decline_backoff"
    if waits is not None:
        return waits
    today = [one for one in settled if int(one["ago_s"]) < 86_400]
    if wire.get("max_per_day") and len(today) >= int(wire["max_per_day"]):
        return "max_per_day"
    return None


# -- e164 --------------------------------------------------------------------------------------


def _e164(case: dict[str, Any], tariff: Tariff | None) -> tuple[Any, Any]:
    if tariff is None:
        raise ValueError("an e164 case needs a deck: name it in the file or with --deck")
    wanted = case.get("expected_per_minute")
    expected = {
        "prefix": case.get("expected_prefix"),
        "per_minute": None if wanted is None else _value(wanted),
        "type": case.get("expected_type"),
        "country": case.get("expected_country"),
    }
    number = str(case["number"])
    digits = digits_of(number)
    rate = None if digits is None else tariff.find(digits)
    if rate is None:
        return expected, dict.fromkeys(expected)
    return expected, {
        "prefix": rate.prefix,
        "per_minute": Fraction(rate.per_minute, 10**rate.scale),
        "type": rate.type,
        "country": rate.country,
    }


_RUNNERS: Final[dict[str, Callable[[dict[str, Any], Tariff | None], tuple[Any, Any]]]] = {
    "rating": _rating,
    "grants": _grants,
    "recharge": _recharge,
    "e164": _e164,
}
