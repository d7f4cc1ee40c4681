"""Play schedules: `python -m tests.simulation --schedules 100000`, or one again with `--seed`."""

import argparse
import contextlib
import gc
import multiprocessing
import os
import sys
from collections import Counter
from time import monotonic
from typing import Final

from tests.simulation.mutants import MUTANTS
from tests.simulation.schedule import Schedule, draw
from tests.simulation.shrink import shrink
from tests.simulation.world import FailedError, run

CHUNK: Final = 250


def play_many(first: int, count: int, mutant: str = "") -> tuple[Counter[str], list[str]]:
    """Play the schedules of seeds in a row; what happened in them, and what failed."""
    happened: Counter[str] = Counter()
    failed: list[str] = []
    with MUTANTS[mutant]() if mutant else contextlib.nullcontext():
        for seed in range(first, first + count):
            try:
                happened += run(draw(seed)).happened
            except FailedError as error:
                failed.append(f"seed {seed}: {error}")
    gc.collect()
    return happened, failed


def _begin_process() -> None:
    """A schedule leaves much that only the collector can find: let it look seldom, and never at
    what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)


def _play_chunk(chunk: tuple[int, int, str]) -> tuple[Counter[str], list[str]]:
    return play_many(*chunk)


def _schedules(first: int, count: int, jobs: int, mutant: str) -> int:
    begun = monotonic()
    happened: Counter[str] = Counter()
    failed: list[str] = []
    chunks = [
        (seed, min(CHUNK, first + count - seed), mutant)
        for seed in range(first, first + count, CHUNK)
    ]
    done = 0
    with multiprocessing.Pool(jobs, _begin_process) as pool:
        for chunk_happened, chunk_failed in pool.imap_unordered(_play_chunk, chunks):
            happened += chunk_happened
            failed += chunk_failed
            done += CHUNK
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{min(done, count):,} of {count:,}, {len(failed)} failed")
    for line in failed[:20]:
        print(line)
    took_s = monotonic() - begun
    counted = ", ".join(f"{number:,} {what}" for what, number in sorted(happened.items()))
    print(f"\n{count:,} schedules in {took_s:.0f} s ({jobs} processes): {len(failed)} failed")
    print(f"in them: {counted}")
    if failed:
        seed = failed[0].split()[1].rstrip(":")
        print(f"see one: python -m tests.simulation --seed {seed}")
    return 1 if failed else 0


def _trace(schedule: Schedule) -> tuple[list[str], FailedError | None]:
    trace: list[str] = []
    try:
        run(schedule, trace)
    except FailedError as error:
        return trace, error
    return trace, None


def _show(seed: int, mutant: str) -> int:
    """One schedule, step by step; one that fails is shrunk first."""
    with MUTANTS[mutant]() if mutant else contextlib.nullcontext():
        schedule = draw(seed)
        trace, error = _trace(schedule)
        if error is not None:
            whole = len(schedule.steps)
            schedule = shrink(schedule, error.what)
            print(f"seed {seed} fails; shrunk from {whole} steps to {len(schedule.steps)}\n")
            trace, error = _trace(schedule)
        head = (
            f"seed {seed}: {schedule.partitions} partitions, {schedule.tenants} tenants, "
            f"jitter {schedule.jitter}, {schedule.most} records a fetch"
        )
        print("\n".join([head, *map(str, schedule.steps), "", *trace]))
    print(f"\n{error or 'holds'}")
    return 0 if error is None else 1


def main() -> int:
    """The command line; exit code 1 when a schedule fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=5_000, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, help="play this one alone and show every step")
    parser.add_argument("--mutant", choices=MUTANTS, default="", help="take a protection out")
    asked = parser.parse_args()
    if asked.seed is not None:
        return _show(asked.seed, asked.mutant)
    return _schedules(asked.first, asked.schedules, asked.jobs, asked.mutant)


if __name__ == "__main__":
    sys.exit(main())
