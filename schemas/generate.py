"""JSON Schemas of every wire type, generated from the types and committed beside them.

`python -m schemas.generate` writes them, with --check it says whether they are up to date. They
use what JSON Schema 2020-12 and draft-07 share, so that AsyncAPI tools read them too.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from schemas.commands import AnyCommand
from schemas.decks import DeckManifest
from schemas.funding import RechargeRequest, RechargeResult
from schemas.ledger import Balance, LedgerEntry
from schemas.notices import Notice
from schemas.usage import CallUsage, ConferenceUsage

FOLDER: Final = Path(__file__).parent / "json"
# A name, not an address: nothing is fetched from there.
BASE: Final = "urn:credits:schemas"

_AT: Final = "2026-03-02T10:00:00Z"
_USAGE: Final = {
    "event_id": "5b0c1f7e",
    "source": "pbx-1",
    "tenant_id": "contoso",
    "kind": "international",
    "call_id": "c-1",
    "callee": "+442079460018",
    "started_at": _AT,
    "duration_s": 219,
}

# (name, type, title, example): the example stands in the schema and is checked by the tests.
WIRE: Final[tuple[tuple[str, Any, str, dict[str, Any]], ...]] = (
    ("telephony.call.usage.v1", CallUsage, "Call usage", _USAGE),
    (
        "telephony.conference.usage.v1",
        ConferenceUsage,
        "Conference usage",
        {**_USAGE, "kind": "conf_dial_out", "conference_id": "m-1", "organizer_id": "u-1"},
    ),
    (
        "credits.command.v1",
        AnyCommand,
        "Command",
        {
            "command": "settings",
            "command_id": "0198c0de-0000-7000-8000-000000000001",
            "tenant_id": "contoso",
            "issued_at": _AT,
            "expected_version": 0,
            "policy": {"enabled": True, "trigger": "100", "amount": "200"},
        },
    ),
    (
        "payments.recharge.requested.v1",
        RechargeRequest,
        "Recharge request",
        {
            "recharge_id": "77567ac1-0707-54e0-ba66-341097303e8f",
            "tenant_id": "contoso",
            "epoch": 1,
            "attempt": 1,
            "amount": "200",
            "amount_minor": 20000,
            "exponent": 2,
            "currency": "USD",
            "trigger": "100",
            "balance": "99.5",
            "available": "99.5",
            "exposure": "0",
            "reason": "below_trigger",
            "payment_method": "card-1",
            "requested_at": _AT,
            "expires_at": "2026-03-02T10:15:00Z",
            "policy_version": 1,
            "caused_by": "pbx-1/5b0c1f7e",
        },
    ),
    (
        "payments.recharge.result.v1",
        RechargeResult,
        "Recharge result",
        {
            "result_id": "r-1",
            "source": "payments",
            "tenant_id": "contoso",
            "recharge_id": "77567ac1-0707-54e0-ba66-341097303e8f",
            "payment_id": "p-1",
            "status": "succeeded",
            "amount": {"amount": "200", "currency": "USD"},
            "occurred_at": _AT,
        },
    ),
    (
        "credits.ledger.entry.v1",
        LedgerEntry,
        "Ledger entry",
        {
            "tenant_id": "contoso",
            "seq": 2,
            "kind": "charge",
            "amount": "-0.06",
            "currency": "USD",
            "balance_after": "99.94",
            "at": _AT,
            "booked_at": _AT,
            "caused_by": {
                "topic": "telephony.call.usage.v1",
                "partition": 0,
                "offset": 7,
                "source": "pbx-1",
                "id": "5b0c1f7e",
            },
            "usage_kind": "international",
            "grants": [{"id": "g1", "amount": "-0.06", "left": "99.94"}],
            "hash": "0" * 64,
        },
    ),
    (
        "credits.balance.v1",
        Balance,
        "Balance",
        {
            "tenant_id": "contoso",
            "currency": "USD",
            "balance": "99.94",
            "available": "99.94",
            "seq": 2,
            "hash": "0" * 64,
            "recharge_state": "idle",
            "settings_version": 1,
            "as_of": _AT,
        },
    ),
    (
        "credits.notification.v1",
        Notice,
        "Notice",
        {
            "notice": "command_refused",
            "tenant_id": "contoso",
            "at": _AT,
            "caused_by": "credits-cli/0198c0de",
            "command_id": "0198c0de-0000-7000-8000-000000000001",
            "rule": "trigger_minimum",
            "fix": "Trigger must be at least 5.00 USD.",
            "version": 0,
        },
    ),
    (
        "credits.tariff.v1",
        DeckManifest,
        "Manifest of a rate deck's version",
        {
            "deck": "default",
            "version": "2026-03",
            "effective_from": "2026-03-02T11:00:00Z",
            "published_at": _AT,
            "rows": 232,
            "chunks": 1,
            "size": 8192,
            "sha256": "0" * 64,
        },
    ),
)


def documents() -> dict[str, dict[str, Any]]:
    """Every schema by its file name."""
    made = {}
    for name, kind, title, example in WIRE:
        (schema,), definitions = msgspec.json.schema_components(
            [kind], ref_template="#/$defs/{name}"
        )
        root = dict(schema)
        if "$ref" in root and len(root) == 1:
            root = dict(definitions.pop(str(root["$ref"]).rpartition("/")[2]))
        made[f"{name}.json"] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": f"{BASE}:{name}",
            **root,
            "title": title,
            "examples": [example],
            **({"$defs": definitions} if definitions else {}),
        }
    return made


def stale(folder: Path = FOLDER) -> list[str]:
    """The files of a folder that differ from what the types say."""
    return [
        name
        for name, schema in documents().items()
        if not (folder / name).is_file()
        or (folder / name).read_text(encoding="utf-8") != _text(schema)
    ]


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all schemas into a folder, made if need be; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, schema in documents().items():
        (folder / name).write_text(_text(schema), encoding="utf-8")
        written.append(folder / name)
    return written


def main() -> None:
    """Write the files, or check them."""
    if "--check" not in sys.argv:
        write()
    elif found := stale():
        raise SystemExit(f"out of date: {', '.join(found)}; run python -m schemas.generate")


if __name__ == "__main__":
    main()
