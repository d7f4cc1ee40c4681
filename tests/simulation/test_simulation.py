"""The shard's protocol in thousands of schedules, and proof that the simulation would notice."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tests.simulation.__main__ import play_many
from tests.simulation.mutants import MUTANTS
from tests.simulation.schedule import Schedule, Step, draw
from tests.simulation.shrink import failure_of, shrink
from tests.simulation.world import FailedError, run

SCHEDULES = 5_000
PARTS = 20
# In how many schedules at most each missing protection must show; the rarer need a zombie that
# wakes up at the one turn where it hurts.
WITHIN = {
    "no_fence": 300,
    "fence_last": 1_500,
    "no_barrier": 600,
    "no_position_check": 300,
    "no_dedup": 20,
    "no_chain": 300,
    "offsets_first": 50,
    "group_decides": 200,
    "unknown_is_committed": 100,
    "unknown_is_aborted": 300,
    "restore_stops_short": 20,
    "restore_one_batch_short": 20,
    "restore_reads_aborted": 100,
    "restore_blames_the_log": 4_000,
    "sources_read_aborted": 100,
    "corrected_again": 100,
    "originals_one_batch_off": 100,
    "lagging_ledger_is_deleted": 1_500,
    "asked_for_once_booked_twice": 50,
    "asked_for_and_not_booked": 50,
    "time_gives_money": 50,
    "calls_give_money": 50,
    "payments_refused": 50,
    "sound_is_out_of_shape": 50,
    "new_is_a_conflict": 50,
    "ids_at_random": 20,
    "none_in_flight": 20,
    "in_flight_lost_on_restore": 100,
    "credited_by_tenant": 600,
    "asks_for_too_much": 20,
    "asks_for_nothing": 20,
    "asks_without_a_word": 20,
    "asks_in_the_cooldown": 20,
    "asks_more_often_than_it_may": 200,
    "asks_again_at_once": 50,
    "asks_the_first_card_again": 200,
    "asks_cards_that_are_lost": 50,
    "pauses_for_any_reason": 50,
    "stale_every_other_time": 50,
    "asks_beside_the_transaction": 50,
    "swallowed_half_way": 20,
    "what_is_now_counts": 100,
    "booked_where_it_lies": 50,
}


# Shrunk from seeds: what the simulation has found in the engine. Where a step counts turns, an
# engine that takes other turns passes by the place; the mutants and other seeds still find it.
FOUND = {
    # A batch was fenced while its released shard settled; the shard opened again and fenced the
    # new owner, for Python 3.11's `wait_for` had lost the cancellation.
    "a released shard stays released": Schedule(
        seed=107,
        partitions=2,
        tenants=1,
        jitter=0.3,
        most=1_000,
        steps=(
            Step("start"),
            Step("thaw", gap=0.535),
            Step("kill", n=97),
            Step("usage", n=4, word="conf"),
            Step("wait", gap=7.0),
            Step("slow", word="offsets", s=25.31),
            Step("start", slot=1),
            Step("start", slot=2),
            Step("usage", gap=0.093, n=6, word="conf"),
            Step("freeze", slot=1, n=8),
            Step("command", n=7, word="close"),
            Step("start"),
            Step("wait", gap=7.0),
        ),
    ),
    # Frozen in the middle of a restore, it read half a batch of the owner that had fenced it,
    # called that a loss and stood still for ever although the partition was its own again.
    "a restore that is fenced is no loss": Schedule(
        seed=336,
        partitions=1,
        tenants=1,
        jitter=0.0,
        most=1_000,
        steps=(
            Step("start"),
            Step("freeze", gap=0.05, n=7),
            Step("fails_done", word="offsets"),
            Step("start", gap=0.008, slot=1),
            Step("start", gap=0.434, slot=1),
            Step("kill", gap=0.384, slot=2, n=38),
            Step("wait", gap=9.0),
            Step("conflict", gap=0.148, n=8, word="call"),
            Step("command", gap=0.097, n=13, word="pay"),
        ),
    ),
    # The broker had ended its transaction after the time-out and the worker took that for another
    # installation with its transactional id: it ended, alone in its group.
    "an overdue transaction is nobody else's doing": Schedule(
        seed=104,
        partitions=1,
        tenants=1,
        jitter=0.0,
        most=1_000,
        steps=(Step("start"), Step("lost", word="offsets", s=17.0), Step("wait", gap=20.0)),
    ),
    # A slice that came twice was done twice; so the count of slices in flight was one short, and
    # the one that was lost later was not missed.
    "a slice that comes twice is done once": Schedule(
        seed=2416,
        partitions=1,
        tenants=1,
        jitter=0.0,
        most=1_000,
        steps=(
            Step("start"),
            Step("again", gap=1.28),
            Step("junk", n=10_001),
            Step("wait", gap=2.0),
            Step("lose"),
            Step("junk", n=10_002),
            Step("wait", gap=0.3),
        ),
    ),
    # The model let a question for log ends wait for two minutes; the client gives up after its
    # request time-out, and then the shard opens again.
    "a slow answer about log ends is given up": Schedule(
        seed=38027,
        partitions=1,
        tenants=1,
        jitter=0.0,
        most=1_000,
        steps=(
            Step("start"),
            Step("wait", gap=20.0),
            Step("start", slot=1),
            Step("kill", slot=1, n=4),
            Step("lost", gap=0.466, word="marks", s=26.3),
            Step("command", gap=0.036, n=40_040, word="allowance"),
            Step("slow", word="marks", s=58.03),
            Step("start", slot=1),
            Step("start", slot=2),
            Step("wait", gap=1.2),
        ),
    ),
}


@pytest.mark.parametrize("part", range(PARTS))
def test_every_schedule_keeps_every_promise(part: int) -> None:
    each = SCHEDULES // PARTS
    happened, failed = play_many(1 + part * each, each)
    assert failed == []
    wanted = ("kills", "freezes", "fences", "unknown outcomes", "corrections", "open calls")
    assert min(happened[what] for what in wanted) > 0


def test_every_mutant_is_hunted() -> None:
    assert WITHIN.keys() == MUTANTS.keys()


def first_failure(mutant: str) -> tuple[int, FailedError]:
    for seed in range(1, WITHIN[mutant] + 1):
        error = failure_of(draw(seed))
        if error is not None:
            return seed, error
    pytest.fail(f"{mutant}: not found within {WITHIN[mutant]} schedules")


@pytest.mark.parametrize("mutant", WITHIN)
def test_a_missing_protection_is_found(mutant: str) -> None:
    with MUTANTS[mutant]():
        _, error = first_failure(mutant)
    # A mutant that merely breaks proves nothing.
    broken = ("shard_failed", "AttributeError", "TypeError", "has no attribute")
    assert not any(word in str(error) for word in broken)


def traced(seed: int) -> str:
    trace: list[str] = []
    run(draw(seed), trace)
    return "\n".join(trace)


def test_a_seed_gives_the_same_run_again_in_any_process() -> None:
    code = (
        "from hashlib import sha256\n"
        "from tests.simulation.test_simulation import traced\n"
        "print(sha256(''.join(map(traced, range(1, 30))).encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    here = sha256("".join(map(traced, range(1, 30))).encode()).hexdigest()
    assert said == {here}


def test_a_failing_schedule_is_shrunk_to_the_steps_that_matter() -> None:
    with MUTANTS["no_dedup"]():
        seed, error = first_failure("no_dedup")
        smaller = shrink(draw(seed), error.what)
        again = failure_of(smaller)
    assert again is not None
    assert again.what == error.what
    assert len(smaller.steps) <= 3
    assert failure_of(smaller) is None, "with the protection the same steps do no harm"


def test_a_failure_is_printed_step_by_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", "1", "--mutant", "no_dedup"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "shrunk from" in done.stdout
    assert "STEP" in done.stdout
    assert "at_most_once" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    run(FOUND[name])
