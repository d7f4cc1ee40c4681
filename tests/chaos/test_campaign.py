"""The short form of the campaign: what every change has to get through."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.stage import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(420)]
# Chosen for its schedule: see the assertions.
SEED = 1018
KINDS = "kill_at,zombie,broker_kill,storm,lost_answers,late_commit,payments_kill"
BATCH_POINTS = 2


def test_fifty_thousand_events_survive_a_short_campaign(tmp_path: Path) -> None:
    figures_path = tmp_path / "chaos.json"
    command = [
        sys.executable, "-m", "tests.chaos", "--seed", str(SEED), "--for", "30s",
        "--events", "50000", "--kinds", KINDS, "--json", str(figures_path),
    ]  # fmt: skip
    # In a session of its own: when we are interrupted it hears so once, and stops what it started.
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as campaign:
        try:
            _, told = campaign.communicate()
        except BaseException:
            campaign.send_signal(signal.SIGINT)
            campaign.communicate()
            raise
    assert campaign.returncode == 0, told[-8_000:]
    figures = json.loads(figures_path.read_text())
    counts = figures["counts"]
    assert figures["violations"] == []
    assert figures["events"] >= 50_000
    assert counts["sigkills"] + counts["zombies"] + counts["broker_faults"] >= 10
    assert counts["zombies"] >= 1
    assert counts["broker_faults"] >= 1
    assert len(figures["points"]) >= BATCH_POINTS
    # What administrators did meanwhile: some of it twice, some of it nonsense.
    assert figures["orders"] >= 500
    assert {"applied", "repeated", "conflict", "version_conflict"} <= figures["answers"].keys()
    # One for the tenants that have their own, and one a round.
    assert counts["decks_published"] == 1 + figures["rounds_planned"]
    assert counts["offsets_compared"] >= 1
