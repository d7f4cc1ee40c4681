"""The simulated payment service: derived answers, every behaviour in its share."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import orjson
from msgspec.structs import asdict, replace

from schemas import topics
from schemas.codec import decoder
from schemas.envelope import binary_headers
from schemas.funding import Reason, RechargeRequest, RechargeResult, Status
from schemas.money import Money
from streams.billing import ledger
from streams.billing.events import Cause, ResultEvent
from streams.billing.recharge import TERMINAL_CODES
from streams.testbed import payments
from streams.testbed.payments import Answer, Behaviour, answers

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
REQUESTS = 2_000
PLAIN = Behaviour(decline=0, duplicate=0, reorder=0, delay_ms=0)


def a_request(number: int = 1) -> RechargeRequest:
    return RechargeRequest(
        recharge_id=f"r-{number}",
        tenant_id="t-000001",
        epoch=number,
        attempt=1,
        amount="200",
        amount_minor=20_000,
        exponent=2,
        currency="USD",
        trigger="100",
        balance="99.99",
        available="99.99",
        exposure="0",
        reason=Reason.BELOW_TRIGGER,
        payment_method="card-1",
        requested_at=NOW,
        expires_at=NOW + timedelta(minutes=15),
        policy_version=1,
        caused_by="test/1",
    )


def all_answers(behaviour: Behaviour) -> list[list[Answer]]:
    return [answers(a_request(number), behaviour) for number in range(REQUESTS)]


def content(result: RechargeResult) -> bytes:
    return ledger.content(ResultEvent(result, Cause(topics.RESULT, 0, 0, "test", "1")))


def test_a_request_is_settled_with_the_amount_that_was_asked_for() -> None:
    (answer,) = answers(a_request(), PLAIN)
    assert answer.result.status is Status.SUCCEEDED
    assert answer.result.amount == Money(amount="200", currency="USD")
    assert answer.result.recharge_id == "r-1"
    assert answer.result.tenant_id == "t-000001"


def test_a_declined_request_brings_a_code_and_no_money() -> None:
    (answer,) = answers(a_request(), replace(PLAIN, decline=100))
    assert answer.result.status is Status.DECLINED
    assert answer.result.decline_code
    assert answer.result.amount is None


def test_a_restarted_simulator_answers_the_same() -> None:
    behaviour = Behaviour(decline=30, needs_action=10, never=10, duplicate=30, reorder=30)
    assert all_answers(behaviour) == all_answers(behaviour)


def test_another_seed_decides_otherwise() -> None:
    assert all_answers(Behaviour(decline=50)) != all_answers(Behaviour(decline=50, seed=2))


def test_a_request_published_again_is_answered_by_repeats_and_no_conflicts() -> None:
    again = replace(a_request(), expires_at=NOW + timedelta(minutes=30))
    behaviour = Behaviour(duplicate=100, reorder=100)
    first = answers(a_request(), behaviour)
    assert [content(one.result) for one in answers(again, behaviour)] == [
        content(one.result) for one in first
    ]
    assert answers(again, behaviour) == first


def test_no_two_different_answers_share_an_id() -> None:
    contents: dict[str, bytes] = {}
    behaviour = Behaviour(decline=30, needs_action=10, duplicate=50, reorder=50)
    for said in all_answers(behaviour):
        for one in said:
            result_id = one.result.result_id or ""
            assert contents.setdefault(result_id, content(one.result)) == content(one.result)


def test_an_answer_given_twice_is_one_payment() -> None:
    for first, second in all_answers(replace(PLAIN, duplicate=100)):
        assert first.result.payment_id == second.result.payment_id
        assert first.result.result_id != second.result.result_id
        assert first.delay_ms <= second.delay_ms


def test_only_one_answer_to_a_request_brings_money() -> None:
    for said in all_answers(Behaviour(decline=20, needs_action=10, duplicate=40, reorder=40)):
        paid = {one.result.payment_id for one in said if one.result.status is Status.SUCCEEDED}
        assert len(paid) <= 1


def test_what_is_never_answered_is_never_answered() -> None:
    assert all_answers(replace(PLAIN, never=100)) == [[]] * REQUESTS


def test_behaviours_keep_their_shares() -> None:
    behaviour = replace(PLAIN, decline=30, needs_action=20, never=10)
    said = all_answers(behaviour)
    found = Counter(one[0].result.status if one else None for one in said)
    wanted = {Status.DECLINED: 30, Status.NEEDS_ACTION: 20, None: 10, Status.SUCCEEDED: 40}
    for status, share in wanted.items():
        assert abs(found[status] * 100 // REQUESTS - share) <= 4, status


def test_delays_stay_below_twice_the_longest() -> None:
    delays = [
        one.delay_ms for said in all_answers(Behaviour(delay_ms=50, duplicate=100)) for one in said
    ]
    assert 0 <= min(delays)
    assert 50 < max(delays) <= 100


def test_a_reordered_decline_may_come_before_the_success() -> None:
    behaviour = replace(PLAIN, reorder=100, delay_ms=300)
    assert any(
        one.result.status is Status.DECLINED
        for said in all_answers(behaviour)
        for one in sorted(said, key=lambda answer: answer.delay_ms)[:1]
    )


def test_some_declines_are_final() -> None:
    codes = {one.result.decline_code for (one,) in all_answers(replace(PLAIN, decline=100))}
    assert codes & TERMINAL_CODES


def test_every_answer_is_a_result_that_the_shards_accept() -> None:
    decode = decoder(topics.RESULT).decode
    behaviour = Behaviour(decline=30, needs_action=10, duplicate=50, reorder=50)
    for said in all_answers(behaviour):
        for one in said:
            headers = binary_headers(
                topics.RESULT, source=payments.SOURCE, event_id=one.result.result_id or ""
            )
            value = payments._without_nulls(one.result)
            decoded = decode(b"t-000001", value, headers)
            assert asdict(decoded.event) == asdict(one.result)
            assert not decoded.unknown_fields
            assert None not in orjson.loads(value).values()
