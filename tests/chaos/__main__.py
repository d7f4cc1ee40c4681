"""The chaos campaign: break everything, heal it, and let the auditor judge.

`python -m tests.chaos --seed 7 --for 120s`. Prints its schedule first; the same options give the
same schedule. The exit code is that of `credits verify`: 0 the books hold, 1 violated (or stuck, or
a worker logged what it never may), 75 unknown. Counts go to build/chaos.json as well.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

from streams.cli.demo import environment_of
from streams.cli.operate import seconds_from
from tests.chaos import faults
from tests.chaos.schedule import KINDS, Fault, Lane, Options, Round, plan
from tests.chaos.stage import ROOT, SERVED_WITHIN_S, Stage, StuckError, wait

HOLDS: Final = 0
VIOLATED: Final = 1
UNKNOWN: Final = 75
HEALED_WITHIN_S: Final = 60
AUDIT_WITHIN_S: Final = 1_800
AUDITED_TIMES: Final = 4


def say(text: str) -> None:
    """Progress goes to standard error; the counts, last, to standard output."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Campaign:
    """One campaign on one stage."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.rounds = plan(options)
        self.folder = folder
        self.stage = Stage(options, folder)
        self.healed_s: list[float] = []
        self.audits = 0
        self.verdict = HOLDS
        self.began = monotonic()
        self._checkpoint: Path | None = None

    async def run(self) -> dict[str, Any]:
        """Run all rounds; the figures."""
        try:
            say("starting brokers and workers")
            await self.stage.open()
            self.began = monotonic()
            for one in self.rounds:
                await self._round(one)
                if self.verdict != HOLDS or self.stage.violations:
                    break
            if self.verdict == HOLDS and not self.stage.violations:
                await self._rest_of_the_events()
                self.verdict = await self._audit(everything=True)
        except StuckError as error:
            self.stage.violations.append(f"stuck: {error}")
        finally:
            for violation in (*self.stage.watcher.violations, *self.stage.violations):
                say(f"VIOLATED {violation}")
            figures = self._figures()
            await self.stage.close()
        return figures

    async def _round(self, one: Round) -> None:
        stage = self.stage
        say(f"[{monotonic() - self.began:6.0f} s] {one}")
        stage.payments.wanted = True
        stage.traffic.go()
        before = stage.watcher.booked()
        await wait(lambda: stage.watcher.booked() > before, 60, "a steady installation books")
        breaking = asyncio.gather(
            self._publish(one), *(self._lane(faults_) for faults_ in one.lanes)
        )
        auditing = asyncio.ensure_future(self._audit_during(breaking))
        try:
            await breaking
            await self._heal()
        finally:
            found = await auditing
        await wait(
            lambda: not stage.unread(_version(one)), HEALED_WITHIN_S, "every worker reads the deck"
        )
        self.verdict = found or await self._audit()
        stage.read_logs()
        stage.check_tasks()

    async def _publish(self, one: Round) -> None:
        await asyncio.sleep(one.deck.after_s)
        await self.stage.publish(_version(one), one.deck)

    async def _lane(self, lane: Sequence[Fault]) -> None:
        for fault in lane:
            rough = KINDS[fault.kind].lane is Lane.BROKERS
            self.stage.rough += rough
            began = monotonic()
            try:
                await faults.do(self.stage, fault)
                if rough:
                    await self._books_again()
            except StuckError as error:
                raise StuckError(f"{fault}: {error}") from error
            finally:
                self.stage.rough -= rough
            say(f"           {fault} took {monotonic() - began:.1f} s")

    async def _books_again(self) -> None:
        """Between two faults of brokers or network something must be booked: an outage without
        end would only show that nothing happens in one."""
        before = self.stage.watcher.booked()
        await wait(
            lambda: self.stage.watcher.booked() > before, SERVED_WITHIN_S, "something is booked"
        )

    async def _heal(self) -> None:
        """Everything runs again: then lag 0 within a minute, no open transaction, nothing stuck."""
        stage = self.stage
        stage.network.clear()
        stage.watcher.forget_waiting()
        await wait(stage.in_sync, 90, "every replica is in sync")
        for slot in stage.slots:
            slot.wanted = slot in stage.base
        await stage.served(*stage.base)
        await stage.traffic.pause()
        took = await wait(self._no_lag, HEALED_WITHIN_S, "nothing is left to book")
        self.healed_s.append(took)
        await wait(self._none_open, HEALED_WITHIN_S, "no transaction is open")
        await stage.payments.rest()
        await wait(self._no_lag, HEALED_WITHIN_S, "nothing is left to book")
        await stage.served(*stage.base)
        stage.violations += await stage.told_offsets()
        stage.violations += await stage.hear_answers()

    async def _no_lag(self) -> bool:
        return await self.stage.lag() == 0

    async def _none_open(self) -> bool:
        return not await self.stage.open_transactions()

    async def _audit_during(self, breaking: asyncio.Future[Any]) -> int:
        """Audits one after the other while things break; what one cannot tell, the next may."""
        while not breaking.done():
            code, report, text = await self._audit_onward("60s")
            if code == VIOLATED:
                say(text)
                return code
            if code == HOLDS:
                self.stage.counts["audits_during_faults"] += 1
                self.stage.counts["pending_then"] += report["counts"].get("pending", 0)
            await asyncio.sleep(2)
        return HOLDS

    async def _audit_onward(self, deadline: str) -> tuple[int, dict[str, Any], str]:
        """`credits verify` from the last audit on that held; the next goes on from it."""
        self.audits += 1
        checkpoint = self.folder / f"checkpoint-{self.audits}"
        arguments = ["--checkpoint", str(checkpoint), "--deadline", deadline]
        if self._checkpoint is not None:
            arguments += ["--from", str(self._checkpoint)]
        found = await self._verify(*arguments)
        if found[0] == HOLDS:
            self._checkpoint = checkpoint
        return found

    async def _audit(self, *, everything: bool = False) -> int:
        """From the last audit on, or of everything with what the load foresaw.

        What is pending is asked again, and so is unknown; violated is not.
        """
        code = UNKNOWN
        for again in range(AUDITED_TIMES):
            if everything:
                self.audits += 1
                self.stage.traffic.expect(self.folder / "expectation.json")
                code, report, text = await self._verify(
                    "--expect", str(self.folder / "expectation.json"), "--deadline", "20m"
                )
            else:
                code, report, text = await self._audit_onward("20m")
            self.stage.counts["holds_audited"] += report.get("counts", {}).get("holds", 0)
            done = code == HOLDS and not report["counts"].get("pending", 0)
            if code == VIOLATED or (done and everything) or again == AUDITED_TIMES - 1:
                say(text)
            if done or code == VIOLATED:
                return code
            await asyncio.sleep(1)
        return code or UNKNOWN

    async def _verify(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        inherited = {
            name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "streams",
            "--json",
            "verify",
            *arguments,
            env={**inherited, **environment_of(self.stage.settings)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        out, error = await asyncio.wait_for(process.communicate(), AUDIT_WITHIN_S)
        assert process.returncode is not None
        try:
            report = json.loads(out)
        except ValueError:
            report = {}
        return process.returncode, report, error.decode()

    async def _rest_of_the_events(self) -> None:
        """What the rounds did not write is written as fast as it goes, under a storm of kills."""
        stage = self.stage
        if stage.traffic.produced.sent >= self.options.events:
            return
        left = self.options.events - stage.traffic.produced.sent
        say(f"[{monotonic() - self.began:6.0f} s] writing {left:,} more events under kills")
        stage.payments.wanted = True
        stage.traffic.rate = 20_000
        stage.traffic.go()
        while stage.traffic.produced.sent < self.options.events:
            slot = await stage.any_worker()
            stage.kill(slot)
            await stage.served(slot)
            more = min(stage.traffic.produced.sent + 5_000, self.options.events)
            await wait(partial(stage.traffic.wrote, more), 60, "the load goes on")
        await self._heal()
        stage.read_logs()

    def _figures(self) -> dict[str, Any]:
        stage = self.stage
        unserved = sorted(stage.watcher.unserved_s)
        clean = not (stage.violations or stage.watcher.violations)
        return {
            "seed": self.options.seed,
            "brokers": self.options.brokers,
            "workers": self.options.workers,
            "rounds": len(self.healed_s),
            "rounds_planned": len(self.rounds),
            "seconds": round(monotonic() - self.began),
            "events": stage.traffic.produced.sent if hasattr(stage, "traffic") else 0,
            "distinct_ids": stage.traffic.produced.ids if hasattr(stage, "traffic") else 0,
            "load_producers_broken": stage.traffic.broken if hasattr(stage, "traffic") else 0,
            "orders": stage.traffic.ordered.total() if hasattr(stage, "traffic") else 0,
            "answers": dict(sorted(stage.answers.counts.items())),
            "counts": dict(sorted(stage.counts.items())),
            "points": dict(sorted(stage.points.items())),
            "network": dict(sorted(stage.network.counts.items())),
            "exits": dict(sorted(stage.exits.items())),
            "unserved_after_kill_s": {
                "times": len(unserved),
                "median": round(unserved[len(unserved) // 2], 1) if unserved else None,
                "p90": round(unserved[len(unserved) * 9 // 10], 1) if unserved else None,
                "longest": round(unserved[-1], 1) if unserved else None,
            },
            "healed_longest_s": round(max(self.healed_s, default=0), 1),
            "audits": self.audits,
            "violations": [*stage.watcher.violations, *stage.violations],
            "exit_code": self.verdict if clean else self.verdict or VIOLATED,
        }


def _version(one: Round) -> str:
    return f"round-{one.number}"


def options_from(arguments: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    """The options of a campaign."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--for", dest="for_s", type=seconds_from, default=120, metavar="120s")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1)
    parser.add_argument("--workers", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--events", type=int, default=50_000, help="at least so many")
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--kinds", default="", help=f"of fault, by comma: {', '.join(KINDS)}")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "chaos.json")
    parser.add_argument("--plan-only", action="store_true", help="print the schedule and end")
    parser.add_argument("--keep", action="store_true", help="keep logs and Kafka's data")
    named = parser.parse_args(arguments)
    kinds = tuple(filter(None, named.kinds.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no such kind of fault: {', '.join(unknown)}")
    options = Options(
        seed=named.seed,
        for_s=named.for_s,
        brokers=named.brokers,
        workers=named.workers,
        events=named.events,
        tenants=named.tenants,
        kinds=kinds,
    )
    return options, named


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; its exit code."""
    options, named = options_from(sys.argv[1:] if arguments is None else arguments)
    for one in plan(options):
        say(str(one))
    if named.plan_only:
        return HOLDS
    # Our own clients tell of every broken connection, which is what this is about.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="credits-chaos-"))
    figures = asyncio.run(Campaign(options, folder).run())
    named.json.parent.mkdir(parents=True, exist_ok=True)
    named.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    if figures["exit_code"] or named.keep:
        say(f"logs and topics are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return int(figures["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
