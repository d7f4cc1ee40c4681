"""The schedule of a campaign, without a broker."""

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.schedule import KINDS, Lane, Options, plan
from tests.chaos.worker import POINTS


def test_the_same_options_give_the_same_schedule() -> None:
    options = Options(seed=11, for_s=3_600, brokers=3)
    assert list(map(str, plan(options))) == list(map(str, plan(options)))


def test_another_seed_gives_another_schedule() -> None:
    assert plan(Options(seed=1, for_s=600)) != plan(Options(seed=2, for_s=600))


def test_every_kind_can_be_done() -> None:
    assert FAULTS.keys() == KINDS.keys()


@pytest.mark.parametrize("brokers", [1, 3])
def test_a_long_campaign_has_every_kind_and_every_named_point(brokers: int) -> None:
    faults = [
        fault for one in plan(Options(seed=7, for_s=7_200, brokers=brokers)) for fault in one.faults
    ]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.arguments["point"] for fault in faults if "point" in fault.arguments} >= set(
        POINTS
    )


def test_a_schedule_holds_only_what_was_asked_for() -> None:
    faults = [
        fault
        for one in plan(Options(seed=7, for_s=600, kinds=("kill", "zombie")))
        for fault in one.faults
    ]
    assert {fault.kind for fault in faults} == {"kill", "zombie"}


def test_what_needs_the_installation_for_itself_never_runs_beside_anything() -> None:
    for one in plan(Options(seed=7, for_s=7_200)):
        if any(KINDS[fault.kind].lane is Lane.WHOLE for fault in one.faults):
            assert len(one.lanes) == 1
