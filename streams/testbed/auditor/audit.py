"""The audit of what was read: every subject in turn, partition by partition."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

from schemas import topics
from streams.testbed.auditor.calls import OpenCalls
from streams.testbed.auditor.causes import Causes
from streams.testbed.auditor.commands import Commands, Grants
from streams.testbed.auditor.corrections import Corrections
from streams.testbed.auditor.ledger import Entry, Ledger
from streams.testbed.auditor.letters import Letters, Moves, Refusals
from streams.testbed.auditor.minutes import Coverage
from streams.testbed.auditor.payments import Payments
from streams.testbed.auditor.pools import Pools
from streams.testbed.auditor.prices import Deck, Tariffs
from streams.testbed.auditor.recharges import Moved, Recharges
from streams.testbed.auditor.records import Log
from streams.testbed.auditor.requests import Requests
from streams.testbed.auditor.rows import Rows
from streams.testbed.auditor.settled import Settled
from streams.testbed.auditor.sources import Sources
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.usage import Usage
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import Options, View


def audit(
    logs: Sequence[Log],
    *,
    names: Mapping[str, str],
    partitions: int,
    deck: Deck,
    published: Sequence[Deck] = (),
    options: Options | None = None,
    report: Report | None = None,
    earlier: Mapping[str, Any] | None = None,
    coverage: Coverage | None = None,
) -> tuple[Report, dict[str, Any]]:
    """Audit what was read; the report, and a checkpoint for the next run. Pure."""
    report = report or Report()
    options = options or Options()
    coverage = coverage or Coverage()
    moves = Moves()
    checkpoint: dict[str, Any] = {}
    for log in logs:
        view = View(
            report,
            log,
            names=names,
            partitions=partitions,
            options=options,
            earlier=(earlier or {}).get(str(log.partition)),
        )
        moves.begin(view)
        checkpoint[str(log.partition)] = _audit_one(view, moves, [deck, *published], coverage)
    if options.partition is None and options.tenant is None:
        moves.judge(report)
    for partition, known in checkpoint.items():
        known |= moves.checkpoint(int(partition))
    if options.expect is not None:
        report.compare(json.loads(options.expect.read_text()))
    return report, checkpoint


def _audit_one(
    view: View, moves: Moves, decks: Sequence[Deck], coverage: Coverage
) -> dict[str, Any]:
    """Audit one partition, in an order in which each step has what it needs; its checkpoint."""
    tenants = Tenants(view)
    rows = Rows(view, tenants)
    rows.judge()
    rows.judge_sources()
    tariffs = Tariffs(view, tenants, decks, coverage)
    ledger = Ledger(view, rows, tenants, tariffs)
    ledger.judge()
    balances = ledger.judge_balances()
    letters = Letters(view, ledger, moves)
    letters.read()
    requests = Requests(view)
    requests.judge()
    recharges = _recharges(view, requests)
    refusals = Refusals(view, letters, tenants, requests, tariffs)
    sources = Sources(view, letters, refusals, moves, recharges)
    payments = Payments(view, sources, ledger, tenants, requests)
    grants = Grants(view, ledger)
    settled = Settled(view, rows, tenants, recharges)
    commands = Commands(
        view,
        sources,
        ledger,
        tenants=tenants,
        grants=grants,
        settled=settled,
        requests=requests,
        payments=payments,
        recharges=recharges,
    )
    commands.judge()
    grants.judge()
    payments.judge()
    requests.judge_answers()
    calls = OpenCalls(view, rows, tenants, tariffs)
    usage = Usage(view, sources, ledger, tenants, tariffs, recharges, calls)
    usage.judge()
    calls.judge()
    refusals.judge_conflicts(usage.met, commands.decided, payments.met)
    corrections = Corrections(view, ledger, usage, refusals)
    corrections.judge()
    pools = Pools(view, ledger, tenants, usage, corrections, coverage)
    pools.judge()
    Causes(view, ledger).judge()
    for fault in recharges.judge(
        requests.of_tenant,
        _moved(ledger),
        balances,
        settled=payments.settled,
        answered=requests.answers,
    ):
        if fault.proven:
            view.report.violate(fault.invariant, fault.text)
        else:
            view.report.unknown(fault.invariant, fault.text)
    settled.judge()
    return {
        "recharges": recharges.checkpoint(),
        **view.checkpoint(),
        **tenants.checkpoint(),
        **ledger.checkpoint(),
        **requests.checkpoint(),
        **payments.checkpoint(),
        **commands.checkpoint(),
        **settled.checkpoint(),
        **grants.checkpoint(),
        **usage.checkpoint(),
        **calls.checkpoint(),
        **corrections.checkpoint(),
        **pools.checkpoint(),
    }


def _recharges(view: View, requests: Requests) -> Recharges:
    """Recharges that know which requests look for their causes."""
    recharges = Recharges(
        until=view.now,
        since={
            topic: view.complete_since(topic)
            for topic in (topics.COMMAND, topics.REQUESTED, topics.RESULT, topics.NOTIFICATION)
        },
        trimmed=[view.names[topic] for topic in topics.SOURCES if view.log.gone(topic)],
        whole=view.earlier is None and not view.log.begun,
        earlier=view.remembered("recharges", None),
    )
    recharges.wants(requests.of_tenant)
    return recharges


def _moved(ledger: Ledger) -> dict[str, list[Moved]]:
    """The entries of each tenant as recharges see them, in their order."""
    of_tenant: dict[str, list[Entry]] = {}
    for one in ledger:
        of_tenant.setdefault(one.tenant, []).append(one)
    moved: dict[str, list[Moved]] = {}
    for tenant, entries in of_tenant.items():
        balance = ledger.head(tenant).balance
        moved[tenant] = []
        for one in sorted(entries, key=lambda one: one.seq):
            balance += one.amount
            moved[tenant].append(
                Moved(
                    one.seq,
                    one.kind,
                    one.amount,
                    balance,
                    one.booked_at.astimezone(UTC),
                    one.place,
                    "/".join(one.identity),
                    one.payment,
                    one.recharge_id,
                )
            )
    return moved
