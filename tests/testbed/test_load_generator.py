"""The load generator repeats itself to the byte, and its foresight is right."""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import orjson
import pytest
from aiokafka.errors import KafkaTimeoutError
from msgspec.structs import replace

from schemas import topics
from schemas.codec import Decoded, decoder
from schemas.commands import AnyCommand, Grant, OpenTenant
from schemas.envelope import RejectedError
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing import holds, ledger
from streams.billing.account import Account
from streams.billing.events import Cause, CommandEvent
from streams.billing.legs import usage_event
from streams.billing.outcomes import Terms
from streams.coverage import load_coverage
from streams.decks import load_deck
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.load import Envelope, Expected, Plan, Planned, Profile, Variety, events

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
TERMS = Terms(tariff=load_deck(None), coverage=load_coverage(None))
DECODERS = {topic: decoder(topic).decode for topic in topics.SOURCES}
NOTHING_WRONG = Plan(
    events=2_000, duplicates_ppm=0, late_ppm=0, malformed_ppm=0, wrong_partition_ppm=0
)
EVERYTHING_WRONG = Plan(
    events=20_000,
    tenants=50,
    duplicates_ppm=50_000,
    conflicts_ppm=30_000,
    late_ppm=40_000,
    malformed_ppm=60_000,
    wrong_partition_ppm=20_000,
)


def an_account(tenant_id: str, billing_from: datetime) -> Account:
    command = OpenTenant(
        tenant_id=tenant_id,
        currency="USD",
        billing_from=billing_from,
        opening_balance="1000000",
        issued_at=NOW,
    )
    cause = Cause(topics.COMMAND, 0, 0, "test", "open")
    account = ledger.apply(None, CommandEvent(command, cause), TERMS, NOW).account
    assert account is not None
    return account


class Door:
    """What a shard does with records, without Kafka: decode, judge, tell repeats, apply."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self._contents: dict[tuple[str, str], bytes] = {}

    def takes(self, planned: Planned) -> tuple[Expected, DeadLetterReason | None]:
        """What comes of a record."""
        try:
            decoded: Decoded = DECODERS[planned.topic](
                planned.key, planned.value, list(planned.headers)
            )
        except RejectedError as error:
            return Expected.DEAD_LETTER, error.reason
        event = usage_event(
            decoded.event,  # type: ignore[arg-type]
            Cause(planned.topic, 0, 0, decoded.source, decoded.id),
        )
        late = ledger.Punctuality(NOW).judge(event)
        if late is not None:
            return Expected.DEAD_LETTER, late
        identity = decoded.source, decoded.id
        content = ledger.content(event)
        if identity in self._contents:
            if self._contents[identity] == content:
                return Expected.DUPLICATE, None
            return Expected.DEAD_LETTER, DeadLetterReason.CONFLICT
        tenant = decoded.tenant_id
        if tenant not in self.accounts and re.fullmatch(r"t-\d{6}", tenant):
            self.accounts[tenant] = an_account(tenant, NOW - load.BILLED_SINCE)
        outcome = ledger.apply(self.accounts.get(tenant), event, TERMS, NOW)
        if outcome.refused is not None:
            return Expected.DEAD_LETTER, outcome.refused.reason
        assert outcome.account is not None
        self.accounts[tenant] = outcome.account
        self._contents[identity] = content
        return Expected.BOOK, None


def records(plan: Plan) -> list[Planned]:
    return list(events(plan, NOW))


def share_ppm(count: int, plan: Plan) -> int:
    return count * load.PER_MILLION // plan.events


# -- the same again ---------------------------------------------------------------------------


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("envelope", Envelope)
def test_the_same_plan_and_start_give_the_same_bytes(profile: Profile, envelope: Envelope) -> None:
    plan = replace(EVERYTHING_WRONG, profile=profile, envelope=envelope, events=2_000)
    assert records(plan) == records(plan)


def test_another_seed_gives_other_records() -> None:
    first = {one.value for one in records(NOTHING_WRONG)}
    assert first.isdisjoint(one.value for one in records(replace(NOTHING_WRONG, seed=2)))


def test_a_longer_load_begins_with_the_shorter_one() -> None:
    longer = records(replace(EVERYTHING_WRONG, events=3_000))
    assert longer[:1_000] == records(replace(EVERYTHING_WRONG, events=1_000))


def test_loads_with_names_of_their_own_share_no_id_and_contradict_nothing() -> None:
    door = Door()
    plan = replace(NOTHING_WRONG, events=300)
    for at, name in enumerate(("monday", "tuesday")):
        planned = list(events(replace(plan, run=name), NOW - timedelta(hours=at)))
        assert planned[0].event_id == f"e-{name}-1-0"
        assert {door.takes(one) for one in planned} == {(Expected.BOOK, None)}


def test_an_id_says_seed_and_index_so_that_anybody_can_tell_what_should_exist() -> None:
    planned = records(replace(NOTHING_WRONG, seed=42, events=300))
    assert [one.event_id for one in planned] == [f"e-42-{index}" for index in range(300)]


OPEN = replace(EVERYTHING_WRONG, open_calls_ppm=300_000, events=5_000, rate=50)


def test_open_calls_change_nothing_of_a_load_without_them() -> None:
    assert [one.event_id for one in records(NOTHING_WRONG)] == [
        f"e-1-{index}" for index in range(NOTHING_WRONG.events)
    ]
    assert records(OPEN) == records(OPEN)


def test_an_open_calls_phases_come_in_order_and_apart_and_name_one_leg() -> None:
    plan = replace(NOTHING_WRONG, open_calls_ppm=300_000, rate=50)
    planned = records(plan)
    opened = [one.event_id for one in planned if one.event_id.endswith("-start")]
    assert abs(share_ppm(len(opened), plan) - plan.open_calls_ppm) < 30_000
    assert len(planned) == plan.events + 2 * len(opened)
    place = {one.event_id: at for at, one in enumerate(planned)}
    for start_id in opened[:100]:
        name = start_id.removesuffix("-start")
        start, progress, end = (place[f"{name}{phase}"] for phase in ("-start", "-progress", ""))
        assert progress - start >= 2 * plan.rate
        assert end - progress >= 2 * plan.rate
        legs = set()
        for at in (start, progress, end):
            decoded = DECODERS[planned[at].topic](
                planned[at].key, planned[at].value, list(planned[at].headers)
            )
            cause = Cause("", 0, 0, decoded.source, "")
            event = usage_event(decoded.event, cause)  # type: ignore[arg-type]
            legs.add(holds.leg_of(event))
            # Each is a young sign of life when it is written.
            written = NOW + timedelta(seconds=at // plan.rate)
            assert timedelta(seconds=-5) < written - event.ended_at < timedelta(minutes=3)
        assert len(legs) == 1


def test_open_calls_of_a_load_that_has_stood_still_are_open_now() -> None:
    later = NOW + timedelta(hours=1)
    plan = replace(NOTHING_WRONG, open_calls_ppm=300_000, rate=50, envelope=Envelope.BARE)
    told = [orjson.loads(one.value or b"") for one in events(plan, NOW, lambda: later)]
    signs = [
        datetime.fromisoformat(one["started_at"]) + timedelta(seconds=one["duration_s"])
        for one in told
        if one.get("phase") == "progress"
    ]
    assert signs
    assert {later + timedelta(seconds=load.PHASES_APART_S)} == set(signs)


def test_records_of_open_calls_come_to_what_was_foreseen() -> None:
    door = Door()
    assert [one for one in records(OPEN) if door.takes(one) != (one.expected, one.reason)] == []


# -- what comes of it -------------------------------------------------------------------------


@pytest.mark.parametrize("profile", Profile)
def test_every_record_comes_to_what_was_foreseen(profile: Profile) -> None:
    door = Door()
    wrong = [
        (planned.event_id, planned.expected, planned.reason, came)
        for planned in records(replace(EVERYTHING_WRONG, profile=profile))
        if (came := door.takes(planned)) != (planned.expected, planned.reason)
    ]
    assert wrong == []


@pytest.mark.parametrize("variety", load.VARIETIES, ids=lambda one: one.name)
@pytest.mark.parametrize("topic", [topics.CALL_USAGE, topics.CONFERENCE_USAGE])
def test_each_way_to_be_wrong_has_its_reason(variety: Variety, topic: str) -> None:
    event: dict[str, Any] = {
        "event_id": "e-1-1",
        "tenant_id": "t-000001",
        "kind": "international",
        "call_id": "c-1",
        "conference_id": "m-1",
        "callee": "+442055501234",
        "started_at": (NOW - timedelta(minutes=5)).isoformat(),
        "duration_s": 60,
    }
    key, value = variety.make(event, b"t-000001")
    planned = Planned(topic, key, value, (), Expected.DEAD_LETTER, variety.reason)
    expected = Expected.BOOK if variety.reason is None else Expected.DEAD_LETTER
    assert Door().takes(planned) == (expected, variety.reason)


def test_a_load_has_every_way_to_be_wrong_in_it() -> None:
    plan = replace(NOTHING_WRONG, events=3_000, malformed_ppm=load.PER_MILLION)
    found = Counter(one.reason for one in records(plan))
    assert found.keys() == {variety.reason for variety in load.VARIETIES}


def test_the_varieties_have_names_of_their_own() -> None:
    names = [variety.name for variety in load.VARIETIES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "reason",
    [
        DeadLetterReason.MALFORMED_JSON,
        DeadLetterReason.SCHEMA_VIOLATION,
        DeadLetterReason.CURRENCY_MISMATCH,
        DeadLetterReason.KEY_MISMATCH,
        DeadLetterReason.TOO_LATE,
        DeadLetterReason.FROM_THE_FUTURE,
        DeadLetterReason.UNRATED,
        DeadLetterReason.REFUSED,
        DeadLetterReason.UNKNOWN_TENANT,
    ],
)
def test_a_variety_leads_to(reason: DeadLetterReason) -> None:
    assert any(variety.reason is reason for variety in load.VARIETIES)


# -- shares -----------------------------------------------------------------------------------


def test_shares_are_kept_to_a_fifth() -> None:
    plan = EVERYTHING_WRONG
    planned = records(plan)
    late_before = (NOW - timedelta(hours=49)).isoformat()
    counts = {
        "duplicates": sum(one.expected is Expected.DUPLICATE for one in planned),
        "conflicts": sum(one.reason is DeadLetterReason.CONFLICT for one in planned),
        "misplaced": sum(one.misplaced > 0 for one in planned),
        "late": sum(
            one.expected is Expected.BOOK and started_at(one) < late_before for one in planned
        ),
    }
    wanted = {
        "duplicates": plan.duplicates_ppm,
        "conflicts": plan.conflicts_ppm,
        "misplaced": plan.wrong_partition_ppm,
        "late": plan.late_ppm,
    }
    for name, count in counts.items():
        assert abs(share_ppm(count, plan) - wanted[name]) * 5 <= wanted[name], name


def test_corrections_correct_earlier_usage_of_the_same_place_once() -> None:
    plan = msgspec.structs.replace(EVERYTHING_WRONG, corrections_ppm=100_000)
    planned = records(plan)
    booked: dict[str, Planned] = {}
    corrected: set[str] = set()
    corrections = 0
    for one in planned:
        if one.expected is not Expected.BOOK:
            continue
        event = orjson.loads(one.value or b"{}")
        data = event.get("data", event)
        if data.get("phase") == "correction":
            corrections += 1
            earlier = booked[data["corrects"]]
            assert (earlier.topic, earlier.key, earlier.misplaced) == (one.topic, one.key, 0)
            assert data["corrects"] not in corrected
            corrected.add(data["corrects"])
        booked[one.event_id] = one
    assert abs(share_ppm(corrections, plan) - 100_000) * 5 <= 100_000
    # Some correct a correction.
    assert any("phase" in orjson.loads(booked[name].value or b"{}") for name in corrected)


def started_at(planned: Planned) -> str:
    event = orjson.loads(planned.value or b"{}")
    return str(event.get("data", event)["started_at"])


def test_a_share_of_nothing_is_nothing() -> None:
    planned = records(NOTHING_WRONG)
    assert {one.expected for one in planned} == {Expected.BOOK}
    assert {one.misplaced for one in planned} == {0}


def test_a_repeat_is_byte_for_byte_what_came_before() -> None:
    before: set[tuple[Any, ...]] = set()
    repeats = 0
    for one in records(EVERYTHING_WRONG):
        sent = one.topic, one.key, one.value, one.headers
        if one.expected is Expected.DUPLICATE:
            assert sent in before
            repeats += 1
        before.add(sent)
    assert repeats


def test_usage_ended_before_now_and_within_billing() -> None:
    earliest = NOW - load.BILLED_SINCE
    for one in records(replace(EVERYTHING_WRONG, malformed_ppm=0)):
        event = orjson.loads(one.value or b"{}")
        data = event.get("data", event)
        began = datetime.fromisoformat(data["started_at"])
        assert earliest < began
        if one.reason is None:
            assert began + timedelta(seconds=data["duration_s"]) < NOW


def test_the_hot_tenant_has_nine_tenths_of_the_load() -> None:
    plan = replace(NOTHING_WRONG, profile=Profile.HOT_TENANT, zipf=False)
    hot = sum(one.key == b"t-000001" for one in records(plan))
    assert 880_000 <= share_ppm(hot, plan) <= 920_000


def test_the_second_tenant_has_half_of_what_the_first_has() -> None:
    keys = Counter(one.key for one in records(replace(NOTHING_WRONG, events=20_000)))
    assert 40 <= 100 * keys[b"t-000002"] // keys[b"t-000001"] <= 60


def test_every_destination_is_rated_by_the_packaged_deck() -> None:
    rates = [TERMS.tariff.find(prefix + "5" * length) for prefix, length in load._DESTINATIONS]
    assert None not in rates
    countries = {rate.country for rate in rates if rate is not None}
    assert len(countries) >= 35
    assert all(TERMS.tariff.find(prefix + "5550100") for prefix in load._TOLL_FREE)


def test_no_header_and_no_key_carries_a_number_dialled() -> None:
    for one in records(replace(EVERYTHING_WRONG, events=2_000)):
        shown = [one.key or b"", *(content for _, content in one.headers)]
        assert not any(re.search(rb"\+?\d{7,}", text) for text in shown)


# -- where it goes ----------------------------------------------------------------------------


# The hashes are those of Kafka's own test of murmur2 (UtilsTest).
@pytest.mark.parametrize(
    ("key", "hashed"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"abc", 479470107)],
)
def test_a_record_goes_where_java_would_send_its_key(key: bytes, hashed: int) -> None:
    planned = Planned("any", key, b"", (), Expected.BOOK)
    assert load.partition_of(planned, 12) == (hashed & 0x7FFF_FFFF) % 12


@pytest.mark.parametrize("partitions", [2, 3, 4, 12])
def test_a_misplaced_record_is_never_at_home(partitions: int) -> None:
    for shift in (1, 2, 3):
        planned = Planned("any", b"t-000001", b"", (), Expected.BOOK, misplaced=shift)
        at_home = replace(planned, misplaced=0)
        assert load.partition_of(planned, partitions) != load.partition_of(at_home, partitions)


# -- opening ----------------------------------------------------------------------------------


def commands(plan: Plan, now: datetime) -> list[tuple[str, str, AnyCommand]]:
    return [
        (tenant, command_id, msgspec.convert(command, AnyCommand))
        for tenant, command_id, command in load.opening_commands(plan, now)
    ]


def opened(plan: Plan) -> dict[str, Account]:
    """The accounts that the opening commands of a load come to; none is refused."""
    rows: dict[str, Account] = {}
    for tenant, command_id, command in commands(plan, NOW):
        cause = Cause(topics.COMMAND, 0, 0, load.SOURCE, command_id)
        event = CommandEvent(replace(command, tenant_id=tenant), cause)
        outcome = ledger.apply(rows.get(tenant), event, TERMS, NOW)
        assert outcome.label == "applied"
        assert outcome.notices[0].notice is NoticeKind.COMMAND_APPLIED
        assert outcome.account is not None
        rows[tenant] = outcome.account
    return rows


def test_every_tenant_is_opened_and_set_without_a_refusal() -> None:
    policies = [account.standing.policy for account in opened(Plan(tenants=40)).values()]
    assert len(policies) == 40
    assert {policy.method for policy in policies} == {"fixed", "fixed_multiple", "target"}
    assert {policy.enabled for policy in policies} == {True, False}
    assert any(policy.monthly_cap_nanos for policy in policies)


WELL_OFF = Plan(tenants=40, licensed_ppm=300_000, granted_ppm=200_000)


def test_a_share_of_the_tenants_has_licences_and_grants() -> None:
    accounts = opened(WELL_OFF).values()
    licensed = [account for account in accounts if account.standing.pools]
    assert len(licensed) == 12
    plans = {one.plan for account in licensed for one in account.standing.pools}
    assert plans == {"MCOMEETADV", "MCOPSTN2", "MCOPSTN5"}
    granted = [command for _, _, command in commands(WELL_OFF, NOW) if isinstance(command, Grant)]
    assert len(granted) == 8
    assert {command.kind for command in granted} == {"paid", "promotional"}
    assert sum(command.every_months is not None for command in granted) == 2
    assert sum(len(account.standing.planned) for account in accounts) == 4


def test_licences_and_grants_change_no_command_of_a_load_without_them() -> None:
    without = list(load.opening_commands(replace(WELL_OFF, licensed_ppm=0, granted_ppm=0), NOW))
    assert without == [
        one
        for one in load.opening_commands(WELL_OFF, NOW)
        if one[2]["command"] in ("open_tenant", "settings")
    ]


def test_licences_change_nothing_of_a_load_but_who_pays() -> None:
    licensed = 0
    for one, other in zip(
        records(replace(NOTHING_WRONG, envelope=Envelope.BARE, licensed_ppm=300_000)),
        records(replace(NOTHING_WRONG, envelope=Envelope.BARE)),
        strict=True,
    ):
        event = orjson.loads(one.value or b"{}")
        licensed += event.pop("capability", None) is not None
        event.pop("user_country", None)
        assert event == orjson.loads(other.value or b"{}")
    assert licensed > 100


def test_pools_pay_for_calls_and_come_to_their_end() -> None:
    plan = replace(OPEN, licensed_ppm=1_000_000, tenants=5)
    door = Door()
    door.accounts |= opened(plan)
    assert [one for one in records(plan) if door.takes(one) != (one.expected, one.reason)] == []
    used = {
        (account.tenant_id, one.plan)
        for account in door.accounts.values()
        for one in account.standing.pools
        if one.used
    }
    assert len(used) == 2 * plan.tenants


def test_only_what_was_charged_is_corrected() -> None:
    plan = replace(OPEN, corrections_ppm=100_000)
    named = []
    for one in records(plan):
        if one.expected is Expected.BOOK and b'"corrects"' in (one.value or b""):
            event = orjson.loads(one.value or b"{}")
            named.append(event["corrects"])
    assert len(named) > 100
    assert not [one for one in named if one.endswith(("-start", "-progress"))]


def test_command_ids_are_told_by_seed_and_tenant() -> None:
    first = [one[1] for one in commands(Plan(tenants=20), NOW)]
    assert len(set(first)) == 40
    assert first == [one[1] for one in commands(Plan(tenants=20), NOW)]
    assert set(first).isdisjoint(one[1] for one in commands(Plan(tenants=20, seed=2), NOW))


def test_opening_the_same_tenants_again_later_repeats_no_id_with_other_content() -> None:
    seen: dict[str, bytes] = {}
    for now in (NOW, NOW + timedelta(hours=1)):
        for _, command_id, command in commands(Plan(tenants=3), now):
            event = CommandEvent(command, Cause(topics.COMMAND, 0, 0, "test", command_id))
            assert seen.setdefault(command_id, ledger.content(event)) == ledger.content(event)


class SlowAnswers:
    """Answers one command every 50 seconds of its own clock, `most` of them."""

    def __init__(self, names: Sequence[str], most: int) -> None:
        self.now = 0.0
        self._left = list(names[:most])

    async def getmany(self, **_: Any) -> dict[str, list[Any]]:
        self.now += 50
        if not self._left:
            return {}
        notice = {"command_id": self._left.pop(0), "notice": "command_applied"}
        return {"": [SimpleNamespace(value=orjson.dumps(notice))]}


@pytest.mark.parametrize("most", [10, 4])
async def test_opening_gives_up_on_silence_and_not_on_many_tenants(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = {f"c-{number}": load.tenant_id(number) for number in range(10)}
    reader = SlowAnswers(list(waiting), most)
    monkeypatch.setattr(load, "monotonic", lambda: reader.now)
    if most == 10:
        assert await load._await_answers(reader, waiting) == 0
    else:
        with pytest.raises(TimeoutError, match=r"^6 commands have no answer, and none came for"):
            await load._await_answers(reader, waiting)


# -- writing ----------------------------------------------------------------------------------


class FailingProducer:
    """Takes records and acknowledges them, but for one."""

    def __init__(self, fails_at: int) -> None:
        self._fails_at = fails_at
        self._taken = 0

    async def send(self, *_: Any, **__: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._taken == self._fails_at:
            future.set_exception(KafkaTimeoutError())
        else:
            future.set_result(None)
        self._taken += 1
        return future

    async def stop(self) -> None:
        """Nothing to stop."""


async def test_a_record_that_was_not_acknowledged_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def started(*_: Any, **__: Any) -> FailingProducer:
        return FailingProducer(fails_at=10)

    monkeypatch.setattr(load, "started_producer", started)
    with pytest.raises(KafkaTimeoutError):
        await load.produce(Settings(), replace(NOTHING_WRONG, events=500, rate=0), start=NOW)


def counted(planned: Sequence[Planned]) -> load.Produced:
    produced = load.Produced()
    for one in planned:
        produced.count(one)
    return produced


def test_what_was_foreseen_is_stored_for_the_auditor(tmp_path: Path) -> None:
    plan = replace(EVERYTHING_WRONG, events=3_000)
    planned = records(plan)
    path = tmp_path / "build" / "expectation.json"
    load.write_expectation(path, plan, NOW, counted(planned))
    stored = orjson.loads(path.read_bytes())
    booked = {one.event_id for one in planned if one.expected is Expected.BOOK}
    assert stored["seed"] == plan.seed
    assert stored["sent"] == sum(stored["by_expected"].values()) == 3_000
    assert stored["distinct_ids"] == stored["by_expected"]["book"] == len(booked)
    assert sum(stored["by_reason"].values()) == stored["by_expected"]["dead_letter"]


def test_two_loads_do_not_share_their_counts() -> None:
    counted(records(replace(EVERYTHING_WRONG, events=100)))
    assert load.Produced().by_expected == {}
