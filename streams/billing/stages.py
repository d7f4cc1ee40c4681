"""The stages of auto-recharge, and what every occasion does in each of them: one table.

`recharge` moves by it and nothing else. `python -m streams.billing.stages` writes it as a page
for people, which is committed as `docs/stages.md`.
"""

from collections.abc import Iterator
from enum import StrEnum
from itertools import product
from typing import Final


class Stage(StrEnum):
    """Where auto-recharge stands."""

    IDLE = "idle"
    REQUESTED = "requested"
    COOLING = "cooling"
    PAUSED = "paused"
    NEEDS_APPROVAL = "needs_approval"


class Occasion(StrEnum):
    """What can move the stage."""

    SHORT = "short"
    COVERED = "covered"
    SUSPECT = "suspect"
    SUCCEEDED = "succeeded"
    DECLINED = "declined"
    NEEDS_ACTION = "needs_action"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REFUNDED = "refunded"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    DISPUTE_LOST = "dispute_lost"
    EARLIER_SUCCEEDED = "earlier_succeeded"
    EARLIER_OTHER = "earlier_other"
    OVERDUE = "overdue"
    TIME_UP = "time_up"
    PAID_BY_HAND = "paid_by_hand"
    NEW_METHOD = "new_method"
    APPROVE = "approve"
    DENY = "deny"
    RESOLVE = "resolve"


class Step(StrEnum):
    """What an occasion does to the stage, whatever it does to the money."""

    REQUEST = "request"
    COOL = "cool"
    DECLINE = "decline"
    WAIT = "wait"
    PUBLISH = "publish"
    FREE = "free"
    END = "end"
    PAUSE = "pause"
    HALT = "halt"
    STAY = "stay"
    REFUSE = "refuse"
    NEVER = "never"


_MEANING: Final = {
    Occasion.SHORT: "the balance is below the trigger and every guard passes",
    Occasion.COVERED: "the balance is at the trigger or above it again",
    Occasion.SUSPECT: "below the trigger, but a risk class of destinations is above its limit",
    Occasion.SUCCEEDED: "the request in flight was paid",
    Occasion.DECLINED: "the request in flight was declined",
    Occasion.NEEDS_ACTION: "the request in flight waits for a person, such as at the card's bank",
    Occasion.CANCELLED: "the request in flight was cancelled",
    Occasion.EXPIRED: "the request in flight expired at the payment service",
    Occasion.REFUNDED: "money of the request in flight went back, told before its success",
    Occasion.DISPUTE_OPENED: "money of the request in flight is disputed, told before its success",
    Occasion.DISPUTE_WON: "a dispute was won, told before the success",
    Occasion.DISPUTE_LOST: "a dispute was lost, told before the success",
    Occasion.EARLIER_SUCCEEDED: "an earlier attempt was paid after all",
    Occasion.EARLIER_OTHER: "any other answer to an earlier attempt",
    Occasion.OVERDUE: "no answer until `expires_at`",
    Occasion.TIME_UP: "the cooldown or the back-off has passed",
    Occasion.PAID_BY_HAND: "funding by hand was paid, a payment booked, or one came that nobody "
    "asked for",
    Occasion.NEW_METHOD: "a payment method was added",
    Occasion.APPROVE: "command `approve`",
    Occasion.DENY: "command `deny`",
    Occasion.RESOLVE: "command `resolve_recharge`, for the request in flight",
}

_DOES: Final = {
    Step.REQUEST: "a request goes out, and is in flight until it is answered",
    Step.COOL: "the epoch is over; nothing is asked until the cooldown has passed",
    Step.DECLINE: "the next payment method at once that was not declined too often; when there is "
    "none, after a back-off; where money came meanwhile the epoch is over; paused after a terminal "
    "code or four declines in a row",
    Step.WAIT: "the request stays in flight and is not published again",
    Step.PUBLISH: "the same request again, with the same id; after a day a person decides",
    Step.FREE: "auto-recharge may ask again",
    Step.END: "a back-off ends with its epoch, a cooldown goes on",
    Step.PAUSE: "nothing is asked until money comes or a payment method is added",
    Step.HALT: "nothing is asked until a person has approved or denied it",
    Step.STAY: "the stage does not move",
    Step.REFUSE: "the command is refused, with the reason",
    Step.NEVER: "cannot happen",
}

# Where a step may lead; the stage it began in stands for those that do not move it.
LEADS_TO: Final[dict[Step, tuple[Stage, ...]]] = {
    Step.REQUEST: (Stage.REQUESTED,),
    Step.COOL: (Stage.COOLING,),
    Step.DECLINE: (Stage.IDLE, Stage.COOLING, Stage.PAUSED),
    Step.WAIT: (Stage.REQUESTED,),
    Step.PUBLISH: (Stage.REQUESTED,),
    Step.FREE: (Stage.IDLE,),
    Step.END: (Stage.IDLE, Stage.COOLING),
    Step.PAUSE: (Stage.PAUSED,),
    Step.HALT: (Stage.NEEDS_APPROVAL,),
    Step.STAY: (),
    Step.REFUSE: (),
    Step.NEVER: (),
}

_ANSWERS: Final = {
    Occasion.SUCCEEDED: Step.COOL,
    Occasion.DECLINED: Step.DECLINE,
    Occasion.NEEDS_ACTION: Step.WAIT,
    Occasion.CANCELLED: Step.COOL,
    Occasion.EXPIRED: Step.COOL,
    # Told before the success they undo, which is still to come.
    Occasion.REFUNDED: Step.STAY,
    Occasion.DISPUTE_OPENED: Step.STAY,
    Occasion.DISPUTE_WON: Step.STAY,
    Occasion.DISPUTE_LOST: Step.STAY,
}
# Without a request in flight nothing can be said about it.
_NO_ANSWERS: Final = dict.fromkeys((*_ANSWERS, Occasion.OVERDUE), Step.NEVER)

_ROWS: Final[dict[Stage, dict[Occasion, Step]]] = {
    Stage.IDLE: {
        **_NO_ANSWERS,
        Occasion.SHORT: Step.REQUEST,
        Occasion.COVERED: Step.STAY,
        Occasion.SUSPECT: Step.HALT,
        Occasion.EARLIER_SUCCEEDED: Step.COOL,
        Occasion.EARLIER_OTHER: Step.STAY,
        Occasion.TIME_UP: Step.NEVER,
        Occasion.PAID_BY_HAND: Step.STAY,
        Occasion.NEW_METHOD: Step.STAY,
        Occasion.APPROVE: Step.REFUSE,
        Occasion.DENY: Step.REFUSE,
        Occasion.RESOLVE: Step.REFUSE,
    },
    Stage.REQUESTED: {
        **_ANSWERS,
        Occasion.SHORT: Step.NEVER,
        # In flight is in flight: the money will come all the same.
        Occasion.COVERED: Step.STAY,
        Occasion.SUSPECT: Step.NEVER,
        Occasion.EARLIER_SUCCEEDED: Step.STAY,
        Occasion.EARLIER_OTHER: Step.STAY,
        Occasion.OVERDUE: Step.PUBLISH,
        Occasion.TIME_UP: Step.NEVER,
        Occasion.PAID_BY_HAND: Step.STAY,
        Occasion.NEW_METHOD: Step.STAY,
        Occasion.APPROVE: Step.REFUSE,
        Occasion.DENY: Step.REFUSE,
        Occasion.RESOLVE: Step.COOL,
    },
    Stage.COOLING: {
        **_NO_ANSWERS,
        Occasion.SHORT: Step.NEVER,
        Occasion.COVERED: Step.END,
        Occasion.SUSPECT: Step.NEVER,
        Occasion.EARLIER_SUCCEEDED: Step.COOL,
        Occasion.EARLIER_OTHER: Step.STAY,
        Occasion.TIME_UP: Step.FREE,
        Occasion.PAID_BY_HAND: Step.STAY,
        Occasion.NEW_METHOD: Step.STAY,
        Occasion.APPROVE: Step.REFUSE,
        Occasion.DENY: Step.REFUSE,
        Occasion.RESOLVE: Step.REFUSE,
    },
    Stage.PAUSED: {
        **_NO_ANSWERS,
        Occasion.SHORT: Step.NEVER,
        Occasion.COVERED: Step.STAY,
        Occasion.SUSPECT: Step.NEVER,
        Occasion.EARLIER_SUCCEEDED: Step.COOL,
        Occasion.EARLIER_OTHER: Step.STAY,
        Occasion.TIME_UP: Step.NEVER,
        Occasion.PAID_BY_HAND: Step.FREE,
        Occasion.NEW_METHOD: Step.FREE,
        Occasion.APPROVE: Step.REFUSE,
        Occasion.DENY: Step.REFUSE,
        Occasion.RESOLVE: Step.REFUSE,
    },
    Stage.NEEDS_APPROVAL: {
        **_NO_ANSWERS,
        Occasion.SHORT: Step.NEVER,
        # Nothing is missing, so there is nothing to approve.
        Occasion.COVERED: Step.FREE,
        Occasion.SUSPECT: Step.STAY,
        Occasion.EARLIER_SUCCEEDED: Step.COOL,
        Occasion.EARLIER_OTHER: Step.STAY,
        Occasion.TIME_UP: Step.NEVER,
        # Money does not make a suspicion go away; being above the trigger again does.
        Occasion.PAID_BY_HAND: Step.STAY,
        Occasion.NEW_METHOD: Step.STAY,
        Occasion.APPROVE: Step.FREE,
        Occasion.DENY: Step.PAUSE,
        Occasion.RESOLVE: Step.REFUSE,
    },
}

AFTER: Final = {
    (stage, occasion): step for stage, row in _ROWS.items() for occasion, step in row.items()
}


def step_of(stage: str, occasion: Occasion) -> Step:
    """What an occasion does in a stage. One that cannot happen is a defect of ours."""
    step = AFTER[Stage(stage), occasion]
    assert step is not Step.NEVER, f"{occasion} while {stage}"
    return step


def _arrows() -> Iterator[str]:
    for start, end in product(Stage, Stage):
        names = [
            occasion.value
            for occasion in Occasion
            if start is not end and end in LEADS_TO[AFTER[start, occasion]]
        ]
        if names:
            yield f"    {start} --> {end}: {', '.join(names)}"


def drawn() -> str:
    """The table as a page: a state diagram (Mermaid), then every stage, occasion and step."""
    lines = [
        "# Stages of auto-recharge",
        "",
        "Made by `python -m streams.billing.stages` from the table the code moves by.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> idle",
        *_arrows(),
        "```",
        "",
        f"| occasion | {' | '.join(Stage)} |",
        f"|---{'|---' * len(Stage)}|",
    ]
    for occasion in Occasion:
        steps = " | ".join(
            "–" if AFTER[stage, occasion] is Step.NEVER else AFTER[stage, occasion].value
            for stage in Stage
        )
        lines.append(f"| `{occasion}`: {_MEANING[occasion]} | {steps} |")
    lines += ["", "– cannot happen: in flight is only what is `requested`.", ""]
    lines += [f"* **{step}**: {_DOES[step]}." for step in Step if step is not Step.NEVER]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(drawn(), end="")
