"""What a sound record looks like, for the auditor: who refuses one for its shape must be right.

Written from the description of the wire, with nothing from the schemas. It says yes only where
there is no doubt: an odd way to write a time, say, may or may not be understood.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from schemas import topics

Check = Callable[[Any], bool]

TENANT: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_AMOUNT: Final = re.compile(r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_INSTANT: Final = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII
)
_MOST_BYTES: Final = 255
_MOST_SECONDS: Final = 31 * 86_400
KINDS: Final = {
    "emergency",
    "free",
    "voip_leg",
    "conf_dial_in",
    "toll_free_in",
    "conf_dial_out",
    "international",
    "overage_domestic",
    "payg_out",
    "conf_ppm",
}


def _like(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _one_of(*words: str) -> Check:
    return lambda value: isinstance(value, str) and value in words


def _within(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value.encode()) <= _MOST_BYTES


def _id(value: Any) -> bool:
    return _text(value) and bool(value)


def _yes_or_no(value: Any) -> bool:
    return isinstance(value, bool)


def _instant(value: Any) -> bool:
    if not isinstance(value, str) or _INSTANT.fullmatch(value) is None:
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


is_amount: Final = _like(_AMOUNT)
_currency: Final = _like(_CURRENCY)
_country: Final = _like(_COUNTRY)


def _money(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_amount(value.get("amount"))
        and _currency(value.get("currency"))
    )


# Members that must be there, and those that may be; what may be there may also be null, but for
# the ones that have a value of their own when they are absent.
_USAGE: Final[Mapping[str, Check]] = {"call_id": _id, "started_at": _instant}
_MAY_USAGE: Final[Mapping[str, Check]] = {
    "event_id": _id,
    "source": _id,
    "tenant_id": _like(TENANT),
    "kind": _one_of(*KINDS),
    "call_type": _text,
    "number_type": _text,
    "capability": _text,
    "phase": _one_of("start", "progress", "end", "correction"),
    "leg_id": _id,
    "conference_id": _id,
    "organizer_id": _id,
    "user_id": _id,
    "user_country": _country,
    "caller": _text,
    "callee": _text,
    "ended_at": _instant,
    "duration_s": _within(0, _MOST_SECONDS),
    "upstream_charge": is_amount,
    "currency": _currency,
    "corrects": _id,
}
_RESULT: Final[Mapping[str, Check]] = {
    "recharge_id": _id,
    "payment_id": _id,
    "status": _one_of(
        "succeeded",
        "declined",
        "needs_action",
        "cancelled",
        "expired",
        "refunded",
        "dispute_opened",
        "dispute_won",
        "dispute_lost",
    ),
    "occurred_at": _instant,
}
_MAY_RESULT: Final[Mapping[str, Check]] = {
    "result_id": _id,
    "source": _id,
    "tenant_id": _like(TENANT),
    "amount": _money,
    "payment_method": _text,
    "decline_code": _text,
}
_MAY_COMMAND: Final[Mapping[str, Check]] = {
    "command_id": _id,
    "source": _id,
    "tenant_id": _like(TENANT),
    "issued_by": _text,
    "reason": _id,
    "expires_at": _instant,
    "effective_at": _instant,
    "effective_from": _instant,
    "billing_from": _instant,
    "opening_balance": is_amount,
    "time_zone": _text,
    "payment_method": _text,
    "kind": _one_of("paid", "promotional"),
    "priority": _within(0, 1_000),
    "every_days": _within(1, 366),
    "every_months": _within(1, 12),
    "country": _country,
}
_COMMANDS: Final[Mapping[str, Mapping[str, Check]]] = {
    "open_tenant": {"currency": _currency},
    "close_tenant": {},
    "fund": {"amount": _money},
    "book_payment": {"payment_id": _id, "amount": _money},
    "adjustment": {"amount": _money, "reason": _id},
    "grant": {"amount": _money, "reason": _id},
    "void": {"grant_id": _id, "reason": _id},
    "licences": {"capability": lambda text: _id(text) and len(text.encode()) <= 32,
                 "count": _within(0, 1_000_000)},
    "approve": {},
    "deny": {},
    "resolve_recharge": {"recharge_id": _id, "paid": _yes_or_no},
}  # fmt: skip
# Of a resolved recharge they may be absent.
_MAY_RESOLVE: Final[Mapping[str, Check]] = {"payment_id": _id, "amount": _money}
_NEVER_NULL: Final = {"phase", "priority", "time_zone"}


def fits(topic: str, body: Mapping[str, Any]) -> bool:
    """Whether the members of an event are beyond doubt what its topic says they are."""
    may: Mapping[str, Check]
    if topic in topics.USAGE:
        must, may = _USAGE, _MAY_USAGE
        if topic == topics.CONFERENCE_USAGE:
            must = {**must, "conference_id": _id}
    elif topic == topics.RESULT:
        must, may = _RESULT, _MAY_RESULT
    else:
        word = body.get("command")
        if not isinstance(word, str) or word not in _COMMANDS:
            return False
        must = {**_COMMANDS[word], "issued_at": _instant}
        may = {**_MAY_COMMAND, **(_MAY_RESOLVE if word == "resolve_recharge" else {})}
        if word == "grant" and body.get("kind", "paid") is None:
            return False
    return all(check(body.get(name)) for name, check in must.items()) and all(
        check(body[name]) or (body[name] is None and name not in _NEVER_NULL)
        for name, check in may.items()
        if name in body and name not in must
    )
