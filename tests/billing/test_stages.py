"""The table auto-recharge moves by: without holes, drawn as it is, and obeyed by the code."""

from datetime import datetime, timedelta
from itertools import product
from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.commands import Approve, Deny, RechargePolicy
from schemas.funding import RechargeRequest, Status
from streams.billing import recharge
from streams.billing.account import Account
from streams.billing.booking import Draft
from streams.billing.parts import Recharging
from streams.billing.recharge import recharge_id
from streams.billing.stages import AFTER, LEADS_TO, Occasion, Stage, Step, drawn
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_payment,
    a_resolution,
    a_result,
    an_account,
    an_adjustment,
    closing,
    opening,
    settings,
)

ANSWERS = frozenset(Occasion(status.value) for status in Status)
# Longer than every cooldown and back-off here, shorter than the day after which a person decides.
LATER = NOW + timedelta(hours=2)


def test_every_occasion_has_its_step_in_every_stage() -> None:
    assert AFTER.keys() == set(product(Stage, Occasion))
    assert LEADS_TO.keys() == set(Step) == set(AFTER.values())


def test_a_request_in_flight_is_left_only_by_an_answer_to_it_or_by_a_persons_word() -> None:
    leaving = {
        occasion
        for (stage, occasion), step in AFTER.items()
        if stage is Stage.REQUESTED and set(LEADS_TO[step]) - {Stage.REQUESTED}
    }
    assert leaving == {
        Occasion.SUCCEEDED,
        Occasion.DECLINED,
        Occasion.CANCELLED,
        Occasion.EXPIRED,
        Occasion.RESOLVE,
    }


def test_only_what_is_short_brings_a_request_about_and_only_when_idle() -> None:
    asking = [place for place, step in AFTER.items() if step is Step.REQUEST]
    assert asking == [(Stage.IDLE, Occasion.SHORT)]


def test_the_committed_drawing_is_what_the_code_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "stages.md"
    assert page.read_text() == drawn(), (
        "write it again: python -m streams.billing.stages > docs/stages.md"
    )


# -- the code obeys the table ---------------------------------------------------------------------


def short() -> Account:
    """Below its trigger, with a first attempt declined some time ago and nothing in flight."""
    book = Book(an_account("100", trigger="100", methods=["card-1"]))
    book.feed(a_call())
    book.feed(a_result(book.requests[0].recharge_id, Status.DECLINED, payment_id="p-1"))
    assert book.account is not None
    return book.account


def standing(stage: Stage, now: datetime) -> Account:
    """An account of which an earlier attempt is known, in a stage."""
    account = short()
    worn = account.standing.recharging
    plain = replace(worn, stage=stage.value, retry=False, until=None, rounds=0, withheld=None)
    if stage is Stage.COOLING:
        plain = replace(plain, until=now + timedelta(minutes=5))
    if stage is not Stage.REQUESTED:
        return account.changed(recharging=plain)
    outcome = Book(account.changed(recharging=replace(plain, stage=Stage.IDLE.value)))
    outcome.feed(a_call(started_at=now, duration_s=0, kind="free"), now)
    assert outcome.account is not None
    return outcome.account


def _earlier(account: Account) -> str:
    first = account.standing.recharging.attempts[0]
    return recharge_id(account.tenant_id, first.epoch, first.attempt)


def _current(account: Account) -> str:
    assert account.standing.recharging.asked is not None
    return account.standing.recharging.asked.recharge_id


def happen(book: Book, occasion: Occasion, now: datetime) -> str:
    """Bring an occasion about through the one door; the label of what became of it."""
    account = book.account
    assert account is not None
    nothing = a_call(kind="free", started_at=now, duration_s=0)
    if occasion in ANSWERS:
        return book.feed(
            a_result(_current(account), Status(occasion.value), amount="60", occurred_at=now), now
        ).label
    match occasion:
        case Occasion.SHORT:
            return book.feed(nothing, now).label
        case Occasion.COVERED:
            # Money that is no payment, so that nothing else has happened.
            return book.feed(a_command(an_adjustment("1000")), now).label
        case Occasion.SUSPECT:
            policy = replace(account.standing.policy, velocity=(("premium", 0),))
            book.account = account.changed(policy=policy)
            draft = Draft(book.account, a_cause(), now)
            recharge.spent(draft, "premium", 1)
            book.account = draft.account
            return book.feed(nothing, now).label
        case Occasion.EARLIER_SUCCEEDED:
            answer = a_result(_earlier(account), amount="1", payment_id="p-1", occurred_at=now)
            return book.feed(answer, now).label
        case Occasion.EARLIER_OTHER:
            answer = a_result(_earlier(account), Status.DECLINED, payment_id="p-1", occurred_at=now)
            return book.feed(answer, now, stale=True).label
        case Occasion.OVERDUE:
            return book.feed(nothing, now + timedelta(minutes=16)).label
        case Occasion.TIME_UP:
            # A stale balance asks for nothing, so the stage that time leads to can be seen.
            return book.feed(nothing, now + timedelta(minutes=6), stale=True).label
        case Occasion.PAID_BY_HAND:
            return book.feed(a_command(a_payment("0.5")), now, stale=True).label
        case Occasion.NEW_METHOD:
            change = settings(
                account.standing.settings_version, payment_methods=["card-1", "card-9"]
            )
            return book.feed(a_command(change), now, stale=True).label
        case Occasion.APPROVE:
            answer_to = a_command(Approve(tenant_id="t-1", issued_at=now))
            return book.feed(answer_to, now, stale=True).label
        case Occasion.DENY:
            return book.feed(a_command(Deny(tenant_id="t-1", issued_at=now)), now).label
        case Occasion.RESOLVE:
            asked = account.standing.recharging.asked
            name = asked.recharge_id if asked else _earlier(account)
            return book.feed(
                a_command(a_resolution(name, paid=True, payment_id="p-9", amount="1")), now
            ).label
    raise AssertionError(occasion)


@pytest.mark.parametrize(
    ("stage", "occasion"),
    [place for place, step in AFTER.items() if step is not Step.NEVER],
    ids=lambda one: one.value,
)
def test_the_code_moves_as_the_table_says(stage: Stage, occasion: Occasion) -> None:
    book = Book(standing(stage, LATER))
    assert book.stage == stage
    label = happen(book, occasion, LATER)
    step = AFTER[stage, occasion]
    assert (label == "refused") is (step is Step.REFUSE)
    assert book.stage in (LEADS_TO[step] or (stage,))
    assert (book.stage == Stage.REQUESTED) is (_asked(book) is not None)


@pytest.mark.parametrize("change", ["payment", "policy", "method"])
def test_whatever_brings_the_balance_back_leaves_nothing_to_approve(change: str) -> None:
    book = Book(standing(Stage.NEEDS_APPROVAL, LATER))
    assert book.account is not None
    version = book.account.standing.settings_version
    match change:
        case "payment":
            book.feed(a_command(a_payment("1000")), LATER)
        case "policy":
            lower = RechargePolicy(enabled=True, trigger="5", amount="50")
            book.feed(a_command(settings(version, policy=lower)), LATER)
        case _:
            book.feed(a_command(settings(version, payment_methods=["card-9"])), LATER)
            book.feed(a_command(an_adjustment("1000")), LATER)
    assert book.stage == Stage.IDLE


@pytest.mark.parametrize(
    ("stage", "occasion"),
    [
        place
        for place, step in AFTER.items()
        if step is Step.NEVER and place[1] in (Occasion.SHORT, Occasion.SUSPECT)
    ],
    ids=lambda one: one.value,
)
def test_what_cannot_happen_does_not(stage: Stage, occasion: Occasion) -> None:
    book = Book(standing(stage, LATER))
    happen(book, occasion, LATER)
    assert book.stage == stage
    assert book.requests == []


def _asked(book: Book) -> object:
    assert book.account is not None
    return book.account.standing.recharging.asked


# -- any walk -------------------------------------------------------------------------------------

ACTIONS = st.sampled_from(
    [
        *("use", "use", "wait", "wait long", "answer", "answer", "answer", "late answer", "spend"),
        *("approve", "deny", "resolve", "resolve unpaid", "pay", "method", "policy", "close"),
    ]
)
WALKS = st.lists(st.tuples(ACTIONS, st.integers(0, 50)), min_size=4, max_size=25)
AUTO_ENDS = frozenset({Status.SUCCEEDED, Status.DECLINED, Status.CANCELLED, Status.EXPIRED})


def act(book: Book, action: str, size: int, at: int, now: datetime) -> tuple[str, str] | None:
    """Do something; which request it answered for good, and the label, when it was an answer."""
    account = book.account
    assert account is not None
    version = account.standing.settings_version
    asked = account.standing.recharging.asked
    known = account.standing.recharging.attempts
    match action:
        case "use":
            minute = timedelta(minutes=1)
            book.feed(a_call(started_at=now - size * minute, duration_s=60 * size), now)
        case "wait" | "wait long":
            book.feed(a_call(kind="free", started_at=now, duration_s=0), now)
        case "answer" | "late answer":
            of = asked.recharge_id if asked and action == "answer" else None
            if of is None and known:
                one = known[size % len(known)]
                of = recharge_id(account.tenant_id, one.epoch, one.attempt)
            if of is None:
                return None
            status = list(Status)[size % len(Status)]
            answer = a_result(
                of, status, amount="60", payment_id=f"p-{of}-{size % 2}", occurred_at=now
            )
            book.feed(answer, now)
            if status in AUTO_ENDS:
                return of, "answered"
        case "spend":
            draft = Draft(account, a_cause(), now)
            recharge.spent(draft, "premium", size * 10**9)
            book.account = draft.account
        case "approve":
            book.feed(a_command(Approve(tenant_id="t-1", issued_at=now)), now)
        case "deny":
            book.feed(a_command(Deny(tenant_id="t-1", issued_at=now)), now)
        case "resolve" | "resolve unpaid":
            if asked is None:
                return None
            paid = action == "resolve"
            more = {"payment_id": f"r-{at}", "amount": "55"} if paid else {}
            command = a_resolution(asked.recharge_id, paid=paid, **more)
            if book.feed(a_command(command), now).label == "applied":
                return asked.recharge_id, "resolved"
        case "pay":
            book.feed(a_command(a_payment(str(size + 1), f"w-{at}")), now)
        case "method":
            references = [f"card-{one}" for one in range(1, 2 + size % 3)]
            book.feed(a_command(settings(version, payment_methods=references)), now)
        case "policy":
            policy = RechargePolicy(
                enabled=size % 5 != 0, trigger="100", amount="60", velocity={"premium": "40"}
            )
            book.feed(a_command(settings(version, policy=policy)), now)
        case "close":
            again = account.standing.closed_at is not None
            book.feed(a_command(opening() if again else closing()), now)
    return None


@given(walk=WALKS)
@hypothesis.settings(max_examples=200)
def test_whatever_happens_one_request_is_unanswered_and_no_id_asks_for_two_things(
    walk: list[tuple[str, int]],
) -> None:
    book, now = Book(an_account("120", trigger="100", velocity={"premium": "40"})), NOW
    ended: set[str] = set()
    for at, (action, size) in enumerate(walk):
        if action.startswith("wait"):
            now += timedelta(hours=9 if action == "wait long" else 0, minutes=7 * size)
        answered = act(book, action, size, at, now)
        if answered is not None:
            ended.add(answered[0])
        assert (book.stage == Stage.REQUESTED) is (_asked(book) is not None)
        asked: dict[str, RechargeRequest] = {}
        for one in book.requests:
            first = asked.setdefault(one.recharge_id, one)
            assert replace(one, expires_at=first.expires_at) == first
        assert len(asked.keys() - ended) <= 1
        tries = [(one.epoch or 0, one.attempt or 0) for one in asked.values()]
        assert tries == sorted(set(tries))
        assert book.moved == book.balance_nanos


def test_a_row_of_before_these_members_is_read() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(["idle", 3]), type=Recharging).epoch == 3
