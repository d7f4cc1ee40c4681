"""Grants through the command line, on a real broker."""

import secrets
from datetime import UTC, datetime, timedelta
from time import monotonic, sleep

import pytest

from streams.settings import Settings
from tests.cli.conftest import credits_of


@pytest.mark.broker
def test_grants_come_go_and_are_voided_and_the_auditor_agrees(office: Settings) -> None:
    credits, tenant = credits_of(office), f"t-{secrets.token_hex(4)}"
    why = ("--reason", "a test")
    assert credits("tenant", "open", tenant, "--opening-balance", "10").code == 0
    later = (datetime.now(UTC) + timedelta(days=9)).isoformat()
    given = credits("grant", tenant, "5", "--priority", "1", "--every-months", "1", *why)
    assert (given.code, given.row["balance"]) == (0, "15")
    allowance = given.row["grant_id"]
    assert credits("grant", tenant, "9", "--effective-at", later, *why).row["balance"] == "15"
    listed = credits("grants", tenant).rows
    assert [(one["state"], one["amount"]) for one in listed] == [
        ("active", "5"), ("active", "10"), ("planned", "9"), ("planned", "5"),
    ]  # fmt: skip
    assert credits("void", tenant, allowance, *why).row["balance"] == "10"
    again = credits("void", tenant, allowance, *why)
    assert (again.code, "nothing_left" in again.stderr) == (4, True)

    # One lot of 3 goes and one of 7 comes, by time alone.
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    assert credits("grant", tenant, "3", "--expires-at", soon, *why).row["balance"] == "13"
    assert credits("grant", tenant, "7", "--effective-at", soon, "--kind", "paid", *why).code == 0
    deadline = monotonic() + 60
    while credits("balance", tenant).row["balance"] != "17" and monotonic() < deadline:
        sleep(0.5)
    assert credits("balance", tenant).row["balance"] == "17"
    states = [one["state"] for one in credits("grants", tenant).rows]
    assert states == ["active", "active", "planned"]
    verdict = credits("verify", "--tenant", tenant)
    assert verdict.code == 0, verdict.stdout + verdict.stderr
