"""An event loop without real time, in which processes can be frozen and killed at any turn.

Time hardly moves while there is work and jumps to the next timer when there is none, so the same
calls give the same order of turns. A task started in a process's context belongs to it, and so
does everything that task starts.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Final

# More turns than any sound schedule takes: a loop that never rests is a defect, not work.
MOST_TURNS: Final = 400_000

# Every turn takes a little, so that no two things happen at one instant.
TURN_S: Final = 1e-6


class Process:
    """What the loop knows of a process: it can be frozen, and something may wait for its n-th
    turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.held: list[Any] = []
        self.turns = 0
        self.doomed_at = -1
        self.doom: Callable[[], object] | None = None
        self.tasks: list[asyncio.Task[Any]] = []


PROCESS: Final[ContextVar[Process | None]] = ContextVar("process", default=None)


class StuckError(Exception):
    """Nothing can ever happen again, or things happen for ever."""


class Loop(asyncio.BaseEventLoop):
    """See the module's text."""

    _ready: "deque[Any]"
    _scheduled: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._turns = 0

    def time(self) -> float:
        """Seconds since this loop was made."""
        return self._now

    def _write_to_self(self) -> None:
        """Nobody waits in another thread."""

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)._scheduled = False
            if not scheduled:
                raise StuckError("everybody waits and no timer is set")
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        self._turns += len(ready)
        if self._turns > MOST_TURNS:
            raise StuckError(f"no rest after {MOST_TURNS} turns")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            self._now += TURN_S
            process = handle._context.get(PROCESS)
            if process is None:
                handle._run()
            elif process.frozen:
                process.held.append(handle)
            else:
                handle._run()
                process.turns += 1
                if process.turns == process.doomed_at and process.doom is not None:
                    process.doom()

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        """A task; its process keeps it."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, context=context)
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            process.tasks.append(task)
        return task

    def thaw(self, process: Process) -> None:
        """Go on where a process was frozen: what came meanwhile comes now, in its order."""
        process.frozen = False
        self._ready.extend(process.held)
        process.held = []
