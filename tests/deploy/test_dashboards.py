"""Dashboards: made by code, readable by Prometheus, about metrics that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from streams.metrics import DEFINITIONS

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
BOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
NAMES = {definition.name for definition in DEFINITIONS}


def board(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def metrics_in(expression: str) -> set[str]:
    found = set(re.findall(r"\bcredits_[a-z_]+", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def unknown_metrics(dashboard: dict[str, Any]) -> set[str]:
    return {name for text in expressions(dashboard) for name in metrics_in(text)} - NAMES


def test_there_is_a_dashboard() -> None:
    assert [path.name for path in BOARDS] == ["credits-overview.json"]


def test_dashboards_are_what_the_code_makes() -> None:
    done = subprocess.run(
        [sys.executable, str(GRAFANA / "build.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_expression_is_promql(path: Path) -> None:
    for text in expressions(board(path)):
        concrete = text.replace("$__rate_interval", "1m").replace("$job", ".+")
        promql_parser.parse(concrete.replace("$instance", ".+"))


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_metric_exists_in_the_code(path: Path) -> None:
    assert unknown_metrics(board(path)) == set()


def test_a_renamed_metric_would_be_noticed() -> None:
    text = BOARDS[0].read_text().replace("credits_lag_records", "credits_lag_entries")
    assert unknown_metrics(json.loads(text)) == {"credits_lag_entries"}


def test_every_metric_is_on_a_panel_or_on_the_written_list() -> None:
    namespace: dict[str, Any] = {"__name__": "build", "__file__": str(GRAFANA / "build.py")}
    exec(compile((GRAFANA / "build.py").read_text(), "build.py", "exec"), namespace)  # noqa: S102
    charted = {
        name for path in BOARDS for text in expressions(board(path)) for name in metrics_in(text)
    }
    assert NAMES - charted == set(namespace["NOT_CHARTED"])


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_follow_the_rules_of_the_dashboard_linter(path: Path) -> None:
    dashboard = board(path)
    assert dashboard["uid"] == path.stem
    assert dashboard["editable"] is False
    variables = [one["name"] for one in dashboard["templating"]["list"]]
    assert variables == ["datasource", "job", "instance"]
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'job=~"$job"' in target["expr"]
            if "rate(" in target["expr"] or "increase(" in target["expr"]:
                assert "$__rate_interval" in target["expr"]
