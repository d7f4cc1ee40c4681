"""Metrics and probes: closed label sets, and a listener that answers over real HTTP."""

import json

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from schemas.notices import DeadLetterReason
from streams.engine.errors import Stop
from streams.health import Health, Listener
from streams.metrics import DEFINITIONS, Meters


@pytest.fixture
def meters() -> Meters:
    return Meters(CollectorRegistry())


def test_every_metric_says_what_it_means_and_what_to_do() -> None:
    for definition in DEFINITIONS:
        assert definition.name.startswith("credits_")
        assert definition.meaning
        assert definition.remedy
        assert len(definition.labels) == len(definition.values)
    assert len({definition.name for definition in DEFINITIONS}) == len(DEFINITIONS)


def test_no_metric_carries_a_tenant() -> None:
    labels = {label for definition in DEFINITIONS for label in definition.labels}
    assert not labels & {"tenant", "tenant_id", "caller", "callee"}


def test_a_value_outside_a_closed_label_set_is_an_error(meters: Meters) -> None:
    meters["credits_shard_stopped", Stop.STATE_LOST.value].set(1)
    with pytest.raises(KeyError):
        meters["credits_shard_stopped", "boredom"].set(1)
    with pytest.raises(KeyError):
        meters["credits_events_total", "telephony.call.usage.v1"].inc()


def test_closed_label_sets_are_there_from_the_start(meters: Meters) -> None:
    names = {
        tuple(sample.labels.values())
        for family in meters.registry.collect()
        for sample in family.samples
        if sample.name == "credits_dead_letters_total"
    }
    assert {reason for _, reason in names} == {reason.value for reason in DeadLetterReason}


async def test_the_listener_answers_metrics_and_probes(meters: Meters) -> None:
    health = Health(live=True, ready=False, reasons=("partition 3 is opening",))
    listener = Listener("127.0.0.1", 0, meters, lambda: health)
    port = await listener.start()
    base = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{base}/metrics") as page:
                families = list(text_string_to_metric_families(await page.text()))
            async with session.get(f"{base}/livez") as alive:
                assert alive.status == 200
            async with session.get(f"{base}/readyz") as ready:
                assert ready.status == 503
                assert json.loads(await ready.text())["reasons"] == ["partition 3 is opening"]
            async with session.get(f"{base}/table") as closed:
                assert closed.status == 404
    finally:
        await listener.stop()
    assert "credits_build_info" in {family.name for family in families}
