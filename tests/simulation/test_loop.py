"""The loop under the simulation: time jumps, processes freeze, nothing is left to chance."""

import asyncio
import contextlib
from contextvars import Context, copy_context

import pytest

from tests.simulation.loop import PROCESS, Loop, Process, StuckError


def context_of(process: Process) -> Context:
    context = copy_context()
    context.run(PROCESS.set, process)
    return context


def test_a_day_passes_at_once() -> None:
    with contextlib.closing(Loop()) as loop:
        loop.run_until_complete(asyncio.sleep(86_400))
        assert loop.time() == pytest.approx(86_400, abs=0.001)


def test_a_frozen_process_does_nothing_until_it_is_thawed() -> None:
    process, seen = Process("p"), []

    async def work() -> None:
        for number in range(3):
            seen.append(number)
            await asyncio.sleep(1)

    async def story(loop: Loop) -> None:
        task = loop.create_task(work(), context=context_of(process))
        await asyncio.sleep(0.5)
        process.frozen = True
        await asyncio.sleep(10)
        assert seen == [0]
        loop.thaw(process)
        await task
        assert seen == [0, 1, 2]
        assert loop.time() > 12

    with contextlib.closing(Loop()) as loop:
        loop.run_until_complete(story(loop))


def test_what_a_process_starts_belongs_to_it_and_its_doom_comes_at_the_turn_named() -> None:
    process = Process("p")
    turns: list[int] = []

    async def child() -> None:
        while True:
            turns.append(process.turns)
            await asyncio.sleep(0)

    async def parent() -> None:
        await asyncio.ensure_future(child())

    async def story(loop: Loop) -> None:
        def freeze() -> None:
            process.frozen = True

        process.doomed_at, process.doom = 7, freeze
        loop.create_task(parent(), context=context_of(process))
        await asyncio.sleep(1)
        assert process.turns == 7
        assert len(process.tasks) == 2
        loop.thaw(process)
        for task in process.tasks:
            task.cancel()
        await asyncio.wait(process.tasks)

    with contextlib.closing(Loop()) as loop:
        loop.run_until_complete(story(loop))
    assert turns[-1] == 6


def test_waiting_for_nothing_is_noticed() -> None:
    async def for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with contextlib.closing(Loop()) as loop:
        task = loop.create_task(for_ever())
        with pytest.raises(StuckError, match="everybody waits"):
            loop.run_until_complete(task)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
