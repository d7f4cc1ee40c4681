"""An event loop without real time, in which processes can be frozen and killed at any turn.

Time hardly moves while there is work and jumps to the next timer when there is none, so the same
calls give the same order of turns. A task started in a process's context belongs to it, and so
does everything that task starts.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
from typing import Any, Final, TypeVarTuple, Unpack

from msgspec import Struct

Ts = TypeVarTuple("Ts")

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


class _Turn(Struct, gc=False):
    """A call that waits for its turn; None once it is cancelled. asyncio's own handles take as long
    to make as many a turn takes."""

    callback: Callable[..., object] | None
    args: tuple[Any, ...]
    context: Context

    def cancel(self) -> None:
        """Do nothing when the turn comes."""
        self.callback, self.args = None, ()


class _Timer(float):
    """A call that waits for its instant. It is the instant, so that the heap compares numbers."""

    __slots__ = ("args", "callback", "context")
    callback: Callable[..., object] | None
    args: tuple[Any, ...]
    context: Context

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        self.callback, self.args = None, ()


class Loop(asyncio.BaseEventLoop):
    """See the module's text."""

    _ready: "deque[Any]"
    _scheduled: list[Any]
    _closed: bool
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._turns = 0

    def time(self) -> float:
        """Seconds since this loop was made."""
        return self._now

    def _write_to_self(self) -> None:
        """Nobody waits in another thread."""

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> Any:
        """Call with the next turn, in the order of the calls."""
        if self._closed:
            raise RuntimeError("Event loop is closed")
        turn = _Turn(callback, args, copy_context() if context is None else context)
        self._ready.append(turn)
        return turn

    # Python ends forgotten generators by it; there are no other threads.
    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> Any:
        """Call after so many seconds."""
        return self._call_at(self._now + delay, callback, args, context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> Any:
        """Call at an instant of `time`."""
        return self._call_at(when, callback, args, context)

    def _call_at(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> _Timer:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        timer = _Timer(when)
        timer.callback, timer.args = callback, args
        timer.context = copy_context() if context is None else context
        heappush(self._scheduled, timer)
        return timer

    def _run_once(self) -> None:
        """Rounds until somebody stops the loop: to begin each anew takes as long as a turn."""
        ready, scheduled = self._ready, self._scheduled
        take = ready.popleft
        while True:
            if not ready:
                while scheduled and scheduled[0].callback is None:
                    heappop(scheduled)
                if not scheduled:
                    raise StuckError("everybody waits and no timer is set")
                if scheduled[0] > self._now:
                    self._now = float(scheduled[0])
            now = self._now
            while scheduled and scheduled[0] <= now:
                timer = heappop(scheduled)
                if timer.callback is not None:
                    ready.append(timer)
            waiting = len(ready)
            self._turns += waiting
            if self._turns > MOST_TURNS:
                raise StuckError(f"no rest after {MOST_TURNS} turns")
            for _ in range(waiting):
                turn = take()
                callback = turn.callback
                if callback is None:
                    continue
                self._now += TURN_S
                context = turn.context
                process = context.get(PROCESS)
                if process is not None and process.frozen:
                    process.held.append(turn)
                    continue
                try:
                    if turn.args:
                        context.run(callback, *turn.args)
                    else:
                        context.run(callback)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # it ends only this turn, as in asyncio
                    told = {"message": f"Exception in callback {callback!r}", "exception": error}
                    self.call_exception_handler(told)
                if process is not None:
                    process.turns += 1
                    if process.turns == process.doomed_at and process.doom is not None:
                        process.doom()
            if self._stopping:
                return

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
