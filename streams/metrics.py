"""Every metric, once: name, labels, meaning, and what to do about it.

Label sets are closed and made at start wherever their values are known, so that a rate sees the
first increment. No metric carries a tenant: fifty thousand of them would stop the loop at every
scrape.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from typing import Any, Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.funding import Reason, Status
from schemas.notices import DeadLetterReason, Withheld
from schemas.topics import SOURCES
from streams import VERSION
from streams.billing.ledger import LABELS
from streams.billing.recharge import DECLINE_CLASSES
from streams.engine.errors import Stop

OUTCOMES: Final = (*LABELS, "duplicate", "conflict", "moved")
_FAST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_AGE: Final = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0, 86_400.0)
_ANSWER: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0, 86_400.0)
_RESTORE: Final = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Definition(Struct, frozen=True, kw_only=True):
    """One metric. `values` are the closed label values, None for an open label; `remedy` says
    what an operator does when it looks wrong."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    meaning: str
    remedy: str
    labels: tuple[str, ...] = ()
    values: tuple[Sequence[str] | None, ...] = ()
    buckets: tuple[float, ...] = _FAST


DEFINITIONS: Final = (
    Definition(
        name="credits_events_total",
        kind=Counter,
        meaning="Events decided and committed, by source topic and what they came to.",
        remedy="Rejected, conflict and moved point at producers; see the dead letters.",
        labels=("topic", "outcome"),
        values=((*SOURCES, "tick"), OUTCOMES),
    ),
    Definition(
        name="credits_batch_seconds",
        kind=Histogram,
        meaning="From taking a batch to having it committed.",
        remedy="If it grows while transactions do not, the CPU is short: add a worker.",
    ),
    Definition(
        name="credits_transaction_seconds",
        kind=Histogram,
        meaning="From begin to commit of one transaction.",
        remedy="Slow transactions mean a slow broker: look at its disks and replication.",
    ),
    Definition(
        name="credits_event_age_seconds",
        kind=Histogram,
        meaning="From a record's timestamp to its commit, for the newest record of each batch.",
        remedy="Rising age is lag as users feel it.",
        buckets=_AGE,
    ),
    Definition(
        name="credits_lag_records",
        kind=Gauge,
        meaning="Records of a source partition that are not booked yet.",
        remedy="Without progress for a minute the worker ends by itself, unless a producer's "
        "transaction is open (log: source_transaction_open).",
        labels=("topic", "partition"),
        values=(SOURCES, None),
    ),
    Definition(
        name="credits_oldest_unprocessed_seconds",
        kind=Gauge,
        meaning="For how long the worst partition has had waiting records without progress.",
        remedy="Above a minute: see the worker's log and /readyz.",
    ),
    Definition(
        name="credits_charged_total",
        kind=Counter,
        meaning="Money charged, in units of the currency; corrections take nothing off.",
        remedy="A jump is a price, a flood or fraud: compare with events.",
        labels=("currency", "kind"),
        values=(None, ("charge",)),
    ),
    Definition(
        name="credits_recharge_requests_total",
        kind=Counter,
        meaning="Recharge requests published, repeats of unanswered ones included.",
        remedy="Many repeats: the payment service does not answer.",
        labels=("reason",),
        values=(tuple(Reason),),
    ),
    Definition(
        name="credits_recharge_results_total",
        kind=Counter,
        meaning="Answers of the payment service.",
        remedy="A rising share of declines is a payment problem, not ours.",
        labels=("result", "decline_class"),
        values=(tuple(Status), DECLINE_CLASSES),
    ),
    Definition(
        name="credits_recharges_in_flight",
        kind=Gauge,
        meaning="Tenants of this worker whose auto-recharge waits for an answer.",
        remedy="If it only grows, the payment service is away.",
    ),
    Definition(
        name="credits_recharge_oldest_in_flight_seconds",
        kind=Gauge,
        meaning="For how long this worker's oldest auto-recharge has waited for its answer.",
        remedy="Is the payment service away? After a day without an answer a person decides.",
    ),
    Definition(
        name="credits_recharge_duration_seconds",
        kind=Histogram,
        meaning="From asking for an auto-recharge to its final answer.",
        remedy="Rising times are the payment service's; tenants wait without money meanwhile.",
        buckets=_ANSWER,
    ),
    Definition(
        name="credits_recharges_withheld_total",
        kind=Counter,
        meaning="Times a guard began to withhold a recharge, by guard.",
        remedy="See the tenant's notices for the reason and what lifts it.",
        labels=("guard",),
        values=(tuple(Withheld),),
    ),
    Definition(
        name="credits_tenants",
        kind=Gauge,
        meaning="Tenants of this worker by recharge state.",
        remedy="Paused tenants have a payment method that declines: tell them.",
        labels=("state",),
        values=(("idle", "requested", "cooling", "paused", "needs_approval", "closed"),),
    ),
    Definition(
        name="credits_balance",
        kind=Gauge,
        meaning="Sum of this worker's positive and of its negative balances, in units.",
        remedy="A growing negative sum is usage nobody pays for.",
        labels=("currency", "sign"),
        values=(None, ("positive", "negative")),
    ),
    Definition(
        name="credits_exposure",
        kind=Gauge,
        meaning="Money that open calls of this worker's tenants hold, in units of the currency.",
        remedy="For planning: it lowers what is available, so recharges come during calls.",
        labels=("currency",),
        values=(None,),
    ),
    Definition(
        name="credits_holds",
        kind=Gauge,
        meaning="Open calls of this worker's tenants that hold money.",
        remedy="If it falls to none while calls go on, platforms send no progress any more.",
    ),
    Definition(
        name="credits_conservation_drift",
        kind=Gauge,
        meaning="Change of all balances minus the entries written, in units; must be 0.",
        remedy="A defect of ours: stop the workers, keep the topics, run `credits verify`.",
        labels=("currency",),
        values=(None,),
    ),
    Definition(
        name="credits_dead_letters_total",
        kind=Counter,
        meaning="Records that could not be booked, by reason.",
        remedy="`credits dlq list`; after the cause is gone `credits dlq replay`.",
        labels=("topic", "reason"),
        values=(SOURCES, tuple(DeadLetterReason)),
    ),
    Definition(
        name="credits_wrong_partition_total",
        kind=Counter,
        meaning="Records that arrived on a partition their key does not belong to.",
        remedy="A producer uses another partitioner than murmur2: see the contract.",
        labels=("topic",),
        values=(SOURCES,),
    ),
    Definition(
        name="credits_unknown_fields_total",
        kind=Counter,
        meaning="Accepted records with members this version does not know.",
        remedy="A producer is ahead of us, or has a typing error in an optional member.",
        labels=("topic",),
        values=(SOURCES,),
    ),
    Definition(
        name="credits_shard_stopped",
        kind=Gauge,
        meaning="1 when a shard refuses to go on, by reason.",
        remedy="Never restart blindly: /readyz and the log say what was found.",
        labels=("reason",),
        values=(tuple(Stop),),
    ),
    Definition(
        name="credits_hanging_transactions",
        kind=Gauge,
        meaning="Output partitions on which somebody else's transaction stays open.",
        remedy="Who reads committed records, payments too, gets nothing that comes after it: end "
        "it with kafka-transactions.sh find-hanging and abort.",
    ),
    Definition(
        name="credits_shards",
        kind=Gauge,
        meaning="Shards of this worker by state.",
        remedy="Anything but ready for minutes deserves a look at the log.",
        labels=("state",),
        values=(("opening", "ready", "reopening", "fenced", "stopped"),),
    ),
    Definition(
        name="credits_restore_seconds",
        kind=Histogram,
        meaning="From the start of a shard's opening to its first batch, with its turn: four of a "
        "worker read at once.",
        remedy="Long restores mean large tables, or many partitions on one worker: check that "
        "compaction runs.",
        buckets=_RESTORE,
    ),
    Definition(
        name="credits_rows",
        kind=Gauge,
        meaning="Rows of the account table in this worker's memory.",
        remedy="For planning memory.",
    ),
    Definition(
        name="credits_remembered_ids",
        kind=Gauge,
        meaning="Ids in this worker's memory, for telling repeats.",
        remedy="For planning memory.",
    ),
    Definition(
        name="credits_fenced_total",
        kind=Counter,
        meaning="Times another process took over a partition while we still wrote.",
        remedy="Expected after long pauses; often, two installations share a namespace.",
    ),
    Definition(
        name="credits_reopened_total",
        kind=Counter,
        meaning="Shards opened again from Kafka after an error.",
        remedy="Often means an unsteady broker or network.",
        labels=("reason",),
        values=(("error", "offset_gone"),),
    ),
    Definition(
        name="credits_slices_dropped_total",
        kind=Counter,
        meaning="Fetched slices not booked because they did not continue the chain.",
        remedy="Harmless in rebalances (they are read again); steady counts are a defect.",
        labels=("reason",),
        values=(("old", "gap", "lost"),),
    ),
    Definition(
        name="credits_build_info",
        kind=Gauge,
        meaning="Always 1; the labels say what runs.",
        remedy="For telling versions apart in a rolling upgrade.",
        labels=("version", "python", "faust", "aiokafka"),
        values=(None, None, None, None),
    ),
)


class Meters:
    """The metrics of one process: `meters[name, *labels]` is a child, made once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._metrics: dict[str, Any] = {}
        self._children: dict[tuple[str, ...], Any] = {}
        for definition in DEFINITIONS:
            more: dict[str, Any] = {}
            if definition.kind is Histogram:
                more["buckets"] = definition.buckets
            metric = definition.kind(
                definition.name, definition.meaning, definition.labels, registry=registry, **more
            )
            self._metrics[definition.name] = metric
            if None not in definition.values:
                closed = [values for values in definition.values if values is not None]
                for labels in product(*closed):
                    self._add(definition.name, tuple(str(label) for label in labels))
        self[
            "credits_build_info",
            VERSION,
            platform.python_version(),
            version("faust-streaming"),
            version("aiokafka"),
        ].set(1)

    def _add(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self._metrics[name]
        child = metric.labels(*labels) if labels else metric
        self._children[(name, *labels)] = child
        return child

    def __getitem__(self, name_and_labels: tuple[str, ...]) -> Any:
        """The child for a name and its label values. Raises KeyError for an unknown name or for
        values outside a closed set."""
        child = self._children.get(name_and_labels)
        if child is not None:
            return child
        name, *labels = name_and_labels
        definition = next(one for one in DEFINITIONS if one.name == name)
        if len(labels) != len(definition.labels) or any(
            allowed is not None and label not in allowed
            for label, allowed in zip(labels, definition.values, strict=True)
        ):
            raise KeyError(name_and_labels)
        return self._add(name, tuple(labels))
