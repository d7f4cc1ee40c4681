"""A schedule: what is sent and what breaks, in an order drawn from a seed.

A step says all that it does, so that a schedule still means something when steps are left out.
"""

import random
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

SLOTS: Final = 3
TENANTS: Final = ("anna", "ben", "carl")

# What a command step can ask; its words are in `events.py`.
COMMANDS: Final = (
    "fund",
    "adjust",
    "lower",
    "pay",
    "pay_again",
    "policy",
    "methods",
    "close",
    "open",
)
INCLUDED: Final = ("grant", "allowance", "licences", "licences")
FAULTS: Final = ("lost", "unanswered", "fails", "fails_done", "slow")
FAULTY: Final = ("init", "add", "produce", "offsets", "end", "end", "end", "fetch", "marks")


class Step(Struct, frozen=True, omit_defaults=True):
    """One step: `gap` seconds after the one before. `slot` is a worker's place, `n` an event's
    number, a count of turns or a partition, `word` says which, `s` are seconds."""

    do: str
    gap: float = 0.0
    slot: int = 0
    n: int = 0
    word: str = ""
    s: float = 0.0

    def __str__(self) -> str:
        said = [f"{self.do:<10}"]
        said += [f"{name}={getattr(self, name)}" for name in ("slot", "n", "word", "s")
                 if getattr(self, name)]  # fmt: skip
        return f"+{self.gap:5.2f} s  {' '.join(said)}"


class Schedule(Struct, frozen=True):
    """A whole run: `jitter` is the share of requests that take time, `most` the records a fetch
    gives at most."""

    seed: int
    partitions: int
    tenants: int
    jitter: float
    most: int
    steps: Sequence[Step]


# How often each kind of step is drawn, out of their sum.
_WEIGHTS: Final = {
    "usage": 30,
    "repeat": 8,
    "conflict": 2,
    "command": 8,
    "junk": 2,
    "stray": 2,
    "aborted": 3,
    "start": 6,
    "kill": 8,
    "freeze": 4,
    "zombie": 7,
    "thaw": 5,
    "stop": 2,
    "rebalance": 4,
    "fault": 16,
    "cut": 3,
    "markers": 3,
    "fence": 3,
    "compact": 3,
    "rewind": 1,
    "lose": 7,
    "again": 3,
    "wait": 3,
}
_KINDS: Final = tuple(_WEIGHTS)
_SHARES: Final = tuple(_WEIGHTS.values())


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    dice = random.Random(seed)
    partitions = 2 if dice.random() < 0.25 else 1
    steps = [Step("start")]
    if dice.random() < 0.5:
        steps.append(Step("start", gap=_gap(dice), slot=1))
    sent = 0
    for kind in dice.choices(_KINDS, _SHARES, k=dice.randint(3, 15)):
        if kind == "usage":
            # Several in a row, so that batches hold more than one and money runs out.
            for _ in range(dice.randint(1, 3)):
                sent += 1
                steps.append(Step("usage", n=sent, word=dice.choice(("call", "call", "conf"))))
            steps[-1] = Step("usage", _gap(dice), n=sent, word=steps[-1].word)
        elif kind == "zombie":
            steps += _zombie(dice, sent)
            sent += 2
        else:
            steps.append(_step(dice, kind, sent, partitions))
            if kind == "command":
                sent += 1
    _correct(random.Random(f"{seed} corrects"), sent, steps)
    _include(random.Random(f"{seed} includes"), steps)
    _stand_still(random.Random(f"{seed} stands still"), steps)
    return Schedule(
        seed=seed,
        partitions=partitions,
        tenants=dice.randint(1, len(TENANTS)),
        jitter=dice.choice((0.0, 0.02, 0.1, 0.3)),
        most=dice.choice((1, 3, 1_000)),
        steps=tuple(steps),
    )


def _correct(dice: random.Random, sent: int, steps: list[Step]) -> None:
    """Add corrections, with dice of their own, so that all other steps stay what they were. Some
    come twice, some name what is corrected already, and some what never was."""
    for _ in range(dice.randint(0, 4) if sent else 0):
        of = dice.randint(1, sent)
        # Six: of the same tenant, however many there are.
        number = 6 * (5_000 + dice.randrange(2)) + of % 6
        step = Step("correct", _gap(dice), n=number, word=str(of))
        steps.insert(dice.randint(1, len(steps)), step)


def _include(dice: random.Random, steps: list[Step]) -> None:
    """Add grants, allowances and licences, with dice of their own like corrections."""
    for _ in range(dice.randint(0, 3)):
        number = 40_000 + dice.randrange(60)
        step = Step("command", _gap(dice), n=number, word=dice.choice(INCLUDED))
        steps.insert(dice.randint(1, len(steps)), step)


def _stand_still(dice: random.Random, steps: list[Step]) -> None:
    """In a quarter of all schedules a broker stops for a while, with dice of its own. It answers
    fewer questions afterwards than the engine asks before it believes that a source is lost."""
    if dice.random() < 0.25:
        step = Step("still", _gap(dice), n=dice.randint(1, 6))
        steps.insert(dice.randint(1, len(steps)), step)


def _gap(dice: random.Random) -> float:
    return round(dice.choice((0.0, 0.0, 0.01, 0.1, 0.1, 1.0, 3.0)) * dice.random(), 3)


def _turns(dice: random.Random) -> int:
    return dice.randint(1, dice.choice((8, 60, 60, 400)))


def _zombie(dice: random.Random, sent: int) -> list[Step]:
    """A worker stops in the middle of a batch, another takes over, and at any turn of that the
    first goes on."""
    slot = dice.randrange(SLOTS)
    other = (slot + 1) % SLOTS
    return [
        Step("start", slot=slot),
        Step("start", slot=other),
        Step("usage", _gap(dice), n=sent + 1, word="call"),
        Step("usage", _gap(dice), n=sent + 2, word="conf"),
        Step("freeze", slot=slot, n=_turns(dice)),
        Step("relieve", slot=slot, n=_turns(dice), word=str(other)),
        Step("wait", dice.choice((0.7, 1.2, 6.2, 7.0, 9.0))),
    ]


def _step(dice: random.Random, kind: str, sent: int, partitions: int) -> Step:
    gap = _gap(dice)
    slot = dice.randrange(SLOTS)
    earlier = dice.randint(1, max(1, sent))
    match kind:
        case "repeat" | "conflict":
            return Step(kind, gap, n=earlier, word=dice.choice(("call", "conf")))
        case "command":
            return Step(kind, gap, n=sent + 1, word=dice.choice(COMMANDS))
        case "junk" | "stray" | "aborted":
            return Step(kind, gap, n=10_000 + dice.randrange(10_000))
        case "kill" | "freeze":
            return Step(kind, gap, slot=slot, n=_turns(dice))
        case "fault":
            how = dice.choice(FAULTS)
            s = round(dice.choice((0.05, 1.0, 6.0, 18.0, 40.0)) * (0.5 + dice.random()), 2)
            return Step(how, gap, word=dice.choice(FAULTY), s=s)
        case "cut":
            return Step(kind, gap, slot=slot, s=round(dice.choice((1.0, 12.0, 40.0)), 2))
        case "markers":
            return Step(kind, gap, s=round(dice.choice((0.1, 2.0, 12.0)) * dice.random(), 2))
        case "fence" | "compact":
            return Step(kind, gap, n=dice.randrange(partitions))
        case "wait":
            return Step(kind, dice.choice((1.0, 2.0, 7.0, 20.0)))
        case _:
            return Step(kind, gap, slot=slot)
