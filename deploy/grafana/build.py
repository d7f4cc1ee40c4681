"""Makes the dashboards: run it after a change here, or with --check to see that nothing differs.

The panels name metrics of `streams.metrics`; tests hold them against each other.
"""

import sys
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FOLDER: Final = Path(__file__).parent / "dashboards"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE: Final = 'job=~"$job", instance=~"$instance"'

# Metrics that no panel shows, and why.
NOT_CHARTED: Final = {
    "credits_build_info": "for joins and alerts: it never changes while a worker runs",
}


def _query(expression: str, legend: str, place: int = 0) -> Any:
    return (
        prometheus.Dataquery()
        .ref_id("ABCDEFGH"[place])
        .datasource(SOURCE)
        .expr(expression.replace("%", WHERE))
        .legend_format(legend)
    )


def _graph(title: str, unit: str, meaning: str, *queries: tuple[str, str]) -> Any:
    panel = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .unit(unit)
        .datasource(SOURCE)
        .height(8)
        .span(8)
    )
    for place, (expression, legend) in enumerate(queries):
        panel = panel.with_target(_query(expression, legend, place))
    return panel


def _figure(title: str, unit: str, meaning: str, expression: str) -> Any:
    return (
        stat.Panel()
        .title(title)
        .description(meaning)
        .unit(unit)
        .datasource(SOURCE)
        .height(4)
        .span(6)
        .with_target(_query(expression, title))
    )


def _quantiles(metric: str) -> list[tuple[str, str]]:
    return [
        (
            f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{%}}"
            "[$__rate_interval])))",
            name,
        )
        for share, name in (("0.5", "half"), ("0.99", "99 of 100"))
    ]


def _rate(metric: str, *labels: str) -> tuple[str, str]:
    by = ", ".join(labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or "all"
    grouped = f"sum by ({by})" if labels else "sum"
    return f"{grouped} (rate({metric}{{%}}[$__rate_interval]))", legend


def _sum(metric: str, *labels: str) -> tuple[str, str]:
    by = ", ".join(labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or "all"
    grouped = f"sum by ({by})" if labels else "sum"
    return f"{grouped} ({metric}{{%}})", legend


def overview() -> Any:
    """Credits overview: is money booked, is it asked for, and is anything in the way?"""
    board = (
        boards.Dashboard("Credits overview")
        .uid("credits-overview")
        .description("Usage booked, balances, recharges, and what stands in the way.")
        .tags(["credits"])
        .readonly()
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(
            boards.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for name, metric in (("job", "credits_build_info"), ("instance", "credits_build_info")):
        within = "" if name == "job" else '{job=~"$job"}'
        board = board.with_variable(
            boards.QueryVariable(name)
            .label(name.capitalize())
            .datasource(SOURCE)
            .query(f"label_values({metric}{within}, {name})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".+")
            .multi(True)
        )
    panels = [
        _figure(
            "Events a second",
            "ops",
            "Events decided and committed by all workers.",
            _rate("credits_events_total")[0],
        ),
        _figure(
            "Records waiting",
            "short",
            "Records of the source topics that are not booked yet.",
            _sum("credits_lag_records")[0],
        ),
        _figure(
            "Waiting without progress",
            "s",
            "For how long the worst partition has stood. Above a minute its worker ends, or a "
            "producer's transaction is open.",
            "max (credits_oldest_unprocessed_seconds{%})",
        ),
        _figure(
            "Shards that refuse to go on",
            "short",
            "Must be 0. /readyz of the worker and its log say what was found.",
            _sum("credits_shard_stopped")[0],
        ),
        _graph(
            "Events by outcome",
            "ops",
            "What events came to. Rejected, conflict and moved point at producers.",
            _rate("credits_events_total", "outcome"),
        ),
        _graph(
            "Money charged",
            "short",
            "Charged per second, in units of the currency.",
            _rate("credits_charged_total", "currency"),
        ),
        _graph(
            "Balances",
            "short",
            "Sums of positive and of negative balances. A growing negative sum is usage nobody "
            "pays for.",
            _sum("credits_balance", "currency", "sign"),
        ),
        _graph(
            "Open calls",
            "short",
            "What open calls hold, which is not available for others, and how many calls do.",
            _sum("credits_exposure", "currency"),
            _sum("credits_holds"),
        ),
        _graph(
            "Recharge requests",
            "ops",
            "Requests published, by reason; answers of the payment service, by result.",
            _rate("credits_recharge_requests_total", "reason"),
            _rate("credits_recharge_results_total", "result"),
        ),
        _graph(
            "Recharges in flight and withheld",
            "short",
            "Tenants that wait for an answer; times a guard began to withhold.",
            _sum("credits_recharges_in_flight"),
            (
                "sum by (guard) (increase(credits_recharges_withheld_total{%}[$__rate_interval]))",
                "{{guard}}",
            ),
        ),
        _graph(
            "Waiting for payments",
            "s",
            "How long auto-recharges take from request to answer, and how long the oldest one in "
            "flight has waited. Its tenant goes without money meanwhile.",
            ("max (credits_recharge_oldest_in_flight_seconds{%})", "oldest in flight"),
            *_quantiles("credits_recharge_duration_seconds"),
        ),
        _graph(
            "Declines",
            "ops",
            "Declined attempts by class: retryable ones are asked again, terminal ones pause the "
            "tenant at once.",
            (
                "sum by (decline_class) (rate(credits_recharge_results_total"
                '{%, result="declined"}[$__rate_interval]))',
                "{{decline_class}}",
            ),
        ),
        _graph(
            "Balances against entries",
            "short",
            "Must be 0: by how much balances have changed without an entry that says so.",
            ("max by (currency) (credits_conservation_drift{%})", "{{currency}}"),
        ),
        _graph(
            "Tenants by state",
            "short",
            "Paused tenants have a payment method that declines.",
            _sum("credits_tenants", "state"),
        ),
        _graph(
            "Dead letters",
            "ops",
            "Records that could not be booked, by reason. See credits dlq list.",
            _rate("credits_dead_letters_total", "reason"),
            _rate("credits_wrong_partition_total", "topic"),
            _rate("credits_unknown_fields_total", "topic"),
        ),
        _graph(
            "Age when booked",
            "s",
            "From a record's timestamp to its commit: lag as users feel it.",
            *_quantiles("credits_event_age_seconds"),
        ),
        _graph(
            "Batches and transactions",
            "s",
            "How long a batch takes, and its transaction within. A slow broker shows here.",
            *_quantiles("credits_batch_seconds"),
            *_quantiles("credits_transaction_seconds"),
        ),
        _graph(
            "Shards",
            "short",
            "Shards by state; stopped ones refuse to go on and say why in /readyz. Somebody's open "
            "transactions hide what is written after them: end them.",
            _sum("credits_shards", "state"),
            _sum("credits_shard_stopped", "reason"),
            ("sum (credits_hanging_transactions{%})", "somebody's open transactions"),
        ),
        _graph(
            "Restarts of shards",
            "short",
            "Fenced, opened again, slices dropped and read again, and how long opening takes.",
            (
                "sum (increase(credits_fenced_total{%}[$__rate_interval]))",
                "fenced",
            ),
            (
                "sum by (reason) (increase(credits_reopened_total{%}[$__rate_interval]))",
                "opened again: {{reason}}",
            ),
            (
                "sum by (reason) (increase(credits_slices_dropped_total{%}[$__rate_interval]))",
                "slices: {{reason}}",
            ),
            *_quantiles("credits_restore_seconds"),
        ),
        _graph(
            "Rows and remembered ids",
            "short",
            "What workers hold in memory.",
            _sum("credits_rows"),
            _sum("credits_remembered_ids"),
        ),
    ]
    for panel in panels:
        board = board.with_panel(panel)
    return board.build()


DASHBOARDS: Final = {"credits-overview.json": overview}


def main() -> None:
    """Write the files, or with --check say whether they are up to date."""
    check = "--check" in sys.argv
    stale = []
    for name, make in DASHBOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(make()) + "\n"
        path = FOLDER / name
        if check and (not path.is_file() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    if stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python deploy/grafana/build.py")


if __name__ == "__main__":
    main()
