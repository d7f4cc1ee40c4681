"""What the schedules send: every event follows from its number, so that a repeat is one."""

import json
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

from schemas import topics
from streams.billing.rates import Tariff
from streams.billing.tariff import parse_deck
from streams.testbed.auditor.prices import Deck

SOURCE: Final = "simulation"
# Sixty a minute: a few calls take a tenant below its trigger.
DECK: Final = (
    b"Destination Name,Destination Type,Country,Prefix,Price / min\nLondon,landline,GB,4420,60\n"
)


def tariff() -> Tariff:
    """The deck as the product reads it."""
    return parse_deck(DECK.decode(), deck="default", version=Deck(DECK).version)


def _kind(number: int) -> str:
    if number % 9 == 8:
        return "free"
    return "conf_dial_out" if number % 5 == 1 else "international"


def _minutes(number: int) -> int:
    """Three conferences or so empty the pool of a licence."""
    return (20 if number % 5 == 1 else 1) + number % 3


@cache
def usage(number: int, tenant: str, began: datetime, *, conflict: bool = False) -> bytes:
    """A call of one to three minutes, or a conference, for which a tenant may have minutes; a
    conflict says another length under the same id. Some are signs of life of open calls, which
    die while the schedule runs, and some are their ends."""
    members = {
        "event_id": f"u{number}",
        "source": SOURCE,
        "tenant_id": tenant,
        "kind": _kind(number),
        "call_id": f"c{number}",
        "conference_id": f"f{number}",
        "callee": "+442079460018",
        "started_at": (began - timedelta(minutes=90 + number % 50)).isoformat(),
        "duration_s": 60 * _minutes(number) + (7 if conflict else 0),
    }
    alive_at = began - timedelta(seconds=178 - number * 13 % 40)
    if number % 4 == 3:
        since = (alive_at - timedelta(minutes=20)).isoformat()
        members |= {"phase": "progress", "leg_id": f"l{number % 3}", "started_at": since,
                    "duration_s": 1_200 + (7 if conflict else 0)}  # fmt: skip
    elif number % 4 == 2:
        members |= {"leg_id": f"l{number % 3}"}
        if number % 8 == 2:
            members["started_at"] = (alive_at - timedelta(minutes=3)).isoformat()
    return json.dumps(members).encode()


@cache
def correction(number: int, of: int, tenant: str, began: datetime) -> bytes:
    """Another length for an earlier call, or none at all."""
    members = json.loads(usage(of, tenant, began)) | {
        "event_id": f"u{number}",
        "phase": "correction",
        "corrects": f"u{of}",
        "duration_s": 60 * (number % 4),
    }
    return json.dumps(members).encode()


_POLICY: Final = {"enabled": True, "trigger": "100", "amount": "150", "cooldown_s": 2,
                  "max_per_day": 3}  # fmt: skip


@cache
def command(number: int, word: str, tenant: str, began: datetime) -> bytes:
    """A command by its word."""
    usd: dict[str, Any] = {"currency": "USD"}
    members: dict[str, Any]
    match word:
        case "open":
            since = (began - timedelta(days=40)).isoformat()
            members = {"command": "open_tenant", "currency": "USD", "billing_from": since,
                       "opening_balance": "200"}  # fmt: skip
        case "close":
            members = {"command": "close_tenant"}
        case "policy" | "methods":
            members = {"command": "settings", "expected_version": 0, "policy": _POLICY}
            if word == "methods":
                members |= {"payment_methods": ["card-a", "card-b"], "expected_version": 1}
        case "fund":
            members = {"command": "fund", "amount": usd | {"amount": "70"}}
        case "pay" | "pay_again":
            paid = number if word == "pay" else 1
            members = {"command": "book_payment", "payment_id": f"paid-{paid}",
                       "amount": usd | {"amount": "60"}}  # fmt: skip
        case "adjust":
            # It lapses while the schedule runs: time moves money too.
            lapses = (began + timedelta(seconds=5 + number)).isoformat()
            members = {"command": "adjustment", "reason": "gift", "expires_at": lapses,
                       "amount": usd | {"amount": "30"}}  # fmt: skip
        case "grant":
            lapses = (began + timedelta(seconds=3 + number % 20)).isoformat()
            members = {"command": "grant", "reason": "trial", "priority": 10,
                       "expires_at": lapses, "amount": usd | {"amount": "20"}}  # fmt: skip
        case "allowance":
            # It is set back while the schedule runs.
            since = (began - timedelta(days=1) + timedelta(seconds=3 + number % 20)).isoformat()
            members = {"command": "grant", "reason": "daily", "every_days": 1,
                       "effective_at": since, "amount": usd | {"amount": "40"}}  # fmt: skip
        case "licences":
            since = (began - timedelta(hours=3, minutes=number % 50)).isoformat()
            members = {"command": "licences", "capability": "MCOMEETADV",
                       "count": number % 3, "effective_from": since}  # fmt: skip
        case _:
            members = {"command": "adjustment", "reason": "mistake",
                       "amount": usd | {"amount": "-25"}}  # fmt: skip
    members |= {"command_id": f"k{number}", "source": SOURCE, "tenant_id": tenant,
                "issued_at": began.isoformat()}  # fmt: skip
    return json.dumps(members).encode()


def topic_of(word: str) -> str:
    """The topic a usage step writes to."""
    return topics.CALL_USAGE if word == "call" else topics.CONFERENCE_USAGE
