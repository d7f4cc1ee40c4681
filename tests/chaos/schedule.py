"""What a campaign does and in which order: a pure function of its options, seed first."""

import random
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct

from tests.chaos.worker import BATCH_POINTS, REBALANCE_POINTS, RESTORE_POINTS

# A round's share besides its faults: steady before them, healing and the audit after.
ROUND_S: Final = 14
# How long the lanes of a mix are, at least.
MIX_S: Final = 40


class Lane(StrEnum):
    """Faults of one lane follow on each other; the lanes of a round run at the same time."""

    WORKERS = "workers"
    BROKERS = "brokers"
    WHOLE = "whole"  # alone: it needs the installation for itself


class Kind(Struct, frozen=True, kw_only=True):
    """A kind of fault. `seconds` it takes about, `weight` in random mixes (0: only alone)."""

    lane: Lane
    seconds: int
    weight: int
    draw: Callable[[random.Random], dict[str, int | str]] = lambda _: {}


def _point(names: Sequence[str]) -> Callable[[random.Random], dict[str, int | str]]:
    return lambda dice: {"point": dice.choice(names), "passes": dice.randrange(6)}


def _role(dice: random.Random) -> dict[str, int | str]:
    return {
        "role": dice.choice(("leader", "group", "transaction")),
        "partition": dice.randrange(4),
        "seconds": dice.randrange(2, 15),
    }


def _direction(dice: random.Random) -> dict[str, int | str]:
    return {
        "direction": dice.choice(("up", "down", "both")),
        "seconds": dice.randrange(3, 14),
        "then": dice.choice(("late", "reset")),
    }


KINDS: Final[Mapping[str, Kind]] = {
    # Workers.
    "kill": Kind(
        lane=Lane.WORKERS,
        seconds=8,
        weight=8,
        draw=lambda dice: {"workers": dice.randrange(1, 4)},
    ),
    "kill_at": Kind(lane=Lane.WORKERS, seconds=9, weight=12, draw=_point(BATCH_POINTS)),
    "kill_in_restore": Kind(lane=Lane.WORKERS, seconds=14, weight=5, draw=_point(RESTORE_POINTS)),
    "kill_in_rebalance": Kind(
        lane=Lane.WORKERS, seconds=14, weight=5, draw=_point(REBALANCE_POINTS)
    ),
    "pause": Kind(
        lane=Lane.WORKERS, seconds=3, weight=3, draw=lambda dice: {"seconds": dice.randrange(1, 5)}
    ),
    "zombie": Kind(
        lane=Lane.WORKERS,
        seconds=14,
        weight=16,
        draw=lambda dice: {
            "workers": dice.randrange(1, 3),
            "point": dice.choice(
                ("anywhere", "after_compute", "after_begin", "after_send", "after_offsets")
            ),
            "passes": dice.randrange(6),
            "longer": dice.choice((0, 0, 8)),
        },
    ),
    "term": Kind(
        lane=Lane.WORKERS, seconds=5, weight=3, draw=lambda dice: {"times": dice.randrange(1, 3)}
    ),
    "storm": Kind(
        lane=Lane.WORKERS, seconds=12, weight=6, draw=lambda dice: {"kills": dice.randrange(5, 13)}
    ),
    "scale": Kind(lane=Lane.WORKERS, seconds=16, weight=1),
    "rolling": Kind(lane=Lane.WORKERS, seconds=12, weight=1),
    "second_rebalance": Kind(
        lane=Lane.WORKERS,
        seconds=8,
        weight=4,
        draw=lambda dice: {"apart_ms": dice.randrange(1_500)},
    ),
    "payments_kill": Kind(lane=Lane.WORKERS, seconds=3, weight=3),
    "clock": Kind(
        lane=Lane.WORKERS,
        seconds=6,
        weight=2,
        # Two of them together stay below the five minutes at which a shard must stop.
        draw=lambda dice: {"by": dice.choice((-140, -60, 60, 140))},
    ),
    # Brokers and the network.
    "broker_kill": Kind(lane=Lane.BROKERS, seconds=9, weight=8, draw=_role),
    "broker_freeze": Kind(lane=Lane.BROKERS, seconds=12, weight=5, draw=_role),
    "broker_restart": Kind(lane=Lane.BROKERS, seconds=11, weight=3, draw=_role),
    "disk_full": Kind(lane=Lane.BROKERS, seconds=14, weight=2, draw=_role),
    "latency": Kind(
        lane=Lane.BROKERS,
        seconds=8,
        weight=2,
        draw=lambda dice: {"ms": dice.randrange(2, 60), "seconds": dice.randrange(3, 10)},
    ),
    "reset": Kind(
        lane=Lane.BROKERS, seconds=3, weight=4, draw=lambda dice: {"times": dice.randrange(1, 6)}
    ),
    "cut": Kind(lane=Lane.BROKERS, seconds=14, weight=4, draw=_direction),
    "lost_answers": Kind(
        lane=Lane.BROKERS,
        seconds=5,
        weight=5,
        draw=lambda dice: {
            "of": dice.choice(("produce", "offsets", "end", "init", "add")),
            "times": dice.randrange(1, 6),
        },
    ),
    "late_commit": Kind(
        lane=Lane.BROKERS,
        seconds=9,
        weight=5,
        draw=lambda dice: {"ms": dice.randrange(1_000, 10_000), "reset": dice.randrange(2)},
    ),
    # The pairs that kill.
    "zombie_and_late_commit": Kind(lane=Lane.WHOLE, seconds=20, weight=0),
    "payments_and_kill": Kind(lane=Lane.WHOLE, seconds=6, weight=0),
    # What needs the installation for itself.
    "hijack": Kind(
        lane=Lane.WHOLE,
        seconds=75,
        weight=0,
        draw=lambda dice: {"partition": dice.randrange(4)},
    ),
    "two_installations": Kind(lane=Lane.WHOLE, seconds=25, weight=0),
    "rewind": Kind(lane=Lane.WHOLE, seconds=12, weight=0),
    "forget_offsets": Kind(lane=Lane.WHOLE, seconds=12, weight=0),
    "compaction": Kind(lane=Lane.WHOLE, seconds=14, weight=0),
}


class Fault(Struct, frozen=True):
    """One thing that goes wrong."""

    kind: str
    arguments: dict[str, int | str]

    def __str__(self) -> str:
        said = " ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.kind}({said})"


class Publication(Struct, frozen=True):
    """A version of the rate deck that is published so long after the faults of a round have begun:
    all prices in hundredths of the packaged ones, for calls that start from `back_s` before on."""

    after_s: int
    percent: int
    back_s: int

    def __str__(self) -> str:
        return f"deck(after_s={self.after_s} percent={self.percent} back_s={self.back_s})"


class Round(Struct, frozen=True):
    """Steady, then these faults (lane beside lane) and a rate deck, then healing and an audit."""

    number: int
    lanes: tuple[tuple[Fault, ...], ...]
    deck: Publication

    @property
    def faults(self) -> list[Fault]:
        """All faults of the round."""
        return [fault for lane in self.lanes for fault in lane]

    def __str__(self) -> str:
        lanes = " | ".join(", ".join(map(str, lane)) for lane in self.lanes)
        return f"round {self.number}: {lanes} | {self.deck}"


class Options(Struct, frozen=True, kw_only=True):
    """What a campaign is. `kinds` empty: all."""

    seed: int = 7
    for_s: int = 120
    brokers: int = 1
    workers: int = 2
    events: int = 50_000
    tenants: int = 200
    kinds: tuple[str, ...] = ()


def plan(options: Options) -> list[Round]:
    """The rounds of a campaign of about `for_s` seconds: every kind alone once, in random order
    and as far as there is time, mixes in between and after."""
    dice = random.Random(f"chaos/{options.seed}/{options.brokers}")
    of_decks = random.Random(f"decks/{options.seed}")
    kinds = list(options.kinds or KINDS)
    singles = [*kinds]
    dice.shuffle(singles)
    mixable = [kind for kind in kinds if KINDS[kind].weight]
    rounds: list[Round] = []
    left_s = options.for_s
    while left_s > 0 or not rounds:
        if singles and (len(rounds) % 2 == 1 or not mixable):
            # Some a round, one after another: a start and an audit cost more than most faults.
            faults: list[Fault] = []
            while singles and sum(KINDS[one.kind].seconds for one in faults) < ROUND_S:
                faults.append(_drawn(singles.pop(), dice))
            lanes = [tuple(faults)]
        elif mixable:
            lanes = _mix(mixable, dice)
        else:
            lanes = [(_drawn(dice.choice(kinds), dice),)]
        rounds.append(Round(len(rounds) + 1, tuple(lanes), _publication(of_decks)))
        left_s -= ROUND_S + max(sum(KINDS[fault.kind].seconds for fault in lane) for lane in lanes)
    return rounds


def _publication(dice: random.Random) -> Publication:
    # Most usage starts in the minutes before the campaign, some up to 30 days earlier, and open
    # calls start while it goes on.
    back_s = dice.choice((0, 60, 1_200, 20 * 86_400))
    return Publication(dice.randrange(6), dice.randrange(50, 200), back_s)


def _drawn(kind: str, dice: random.Random) -> Fault:
    return Fault(kind, KINDS[kind].draw(dice))


def _mix(kinds: Sequence[str], dice: random.Random) -> list[tuple[Fault, ...]]:
    """Both lanes at once, each for about `MIX_S`."""
    lanes = []
    for lane in (Lane.WORKERS, Lane.BROKERS):
        of_lane = [kind for kind in kinds if KINDS[kind].lane is lane]
        faults: list[Fault] = []
        weights = [KINDS[kind].weight for kind in of_lane]
        while of_lane and sum(KINDS[fault.kind].seconds for fault in faults) < MIX_S:
            faults.append(_drawn(dice.choices(of_lane, weights)[0], dice))
        if faults:
            lanes.append(tuple(faults))
    return lanes
