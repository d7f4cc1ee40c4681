"""Topics as the manifest wants them, on a real cluster of three."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from time import monotonic
from unittest import mock

import msgspec
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.protocol.admin import DescribeConfigsRequest

from schemas import topics
from streams import provision
from streams.provision import BrokerAwayError, Difference, ProvisionError
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.broker import Cluster

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(
        broker.external() is not None, reason="needs three nodes, which only we can start"
    ),
]


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(tmp_path_factory.mktemp("three"), nodes=3) as cluster:
        yield cluster


@pytest.fixture
async def replicated(three_nodes: Cluster) -> AsyncIterator[Settings]:
    """An installation with three copies in a namespace of its own, its topics removed after."""
    settings = Settings(
        broker=three_nodes.bootstrap,
        namespace=f"t-{secrets.token_hex(4)}-",
        partitions=2,
        replication=3,
    )
    yield settings
    await provision.remove_namespace(settings)


async def configure(settings: Settings, name: str, values: dict[str, str]) -> None:
    """Replace what a topic overrides; return when every node knows it."""
    resource = ConfigResource(ConfigResourceType.TOPIC, name, configs=values)
    async with provision._Admin(settings) as admin:
        await admin.alter_configs([resource])
        asked = [(resource.resource_type, name, list(values))]
        for node in admin._client.cluster.brokers():
            deadline = monotonic() + 30
            found: dict[str, str] = {}
            while found != values:
                assert monotonic() < deadline, f"node {node.nodeId} still has {found}"
                answer = await admin._send_request_to_node(
                    node.nodeId, DescribeConfigsRequest(asked, False)
                )
                found = {entry[0]: entry[1] for entry in answer.resources[0][4]}


async def applied(settings: Settings) -> list[Difference]:
    """Apply; return when every node finds nothing left to do. The next question goes to any of
    them, and they hear of a change later than the one that was asked."""
    done = await provision.apply(settings)
    async with provision._Admin(settings) as admin:
        for node in admin._client.cluster.brokers():
            deadline = monotonic() + 30
            with mock.patch.object(admin._client, "get_random_node", return_value=node.nodeId):
                while not await admin._client.ready(node.nodeId) or await provision._plan(
                    admin, settings
                ):
                    assert monotonic() < deadline, f"node {node.nodeId} has not heard of it"
                    await asyncio.sleep(0.05)
    return done


async def overrides(settings: Settings, name: str) -> dict[str, str | None]:
    async with provision._Admin(settings) as admin:
        return (await provision._configs(admin, [name], overrides_only=True))[name]


async def names_on(admin: AIOKafkaAdminClient, namespace: str) -> set[str]:
    return {name for name in await admin.list_topics() if name.startswith(namespace)}


async def test_what_is_missing_is_made_and_the_second_time_nothing_is_left_to_do(
    replicated: Settings,
) -> None:
    wanted = {replicated.topics.of(topic.name) for topic in topics.MANIFEST}
    planned = await provision.plan(replicated)
    assert {one.topic for one in planned if one.what == "missing"} == wanted
    assert await applied(replicated) == planned
    assert await provision.plan(replicated) == []
    assert await provision.apply(replicated) == []
    async with provision._Admin(replicated) as admin:
        assert await names_on(admin, replicated.namespace) == wanted


async def test_who_needs_a_topic_waits_until_the_node_it_asks_has_heard_of_it(
    replicated: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    describe = provision._describe

    async def describing(admin: AIOKafkaAdminClient, names: list[str]) -> object:
        found = await describe(admin, names)
        asked.set()
        return found

    monkeypatch.setattr(provision, "_describe", describing)
    monkeypatch.setattr(provision, "_HEARD_WITHIN_S", 60)
    needed = asyncio.create_task(provision.require(replicated, replicated.topics.sources))
    await asked.wait()
    await provision.apply(replicated)
    await needed


async def test_three_copies_wait_for_two_and_have_the_settings_of_the_manifest(
    replicated: Settings,
) -> None:
    await applied(replicated)
    name = replicated.topics.of(topics.LEDGER)
    async with provision._Admin(replicated) as admin:
        (found,) = await admin.describe_topics([name])
        configs = await provision._configs(admin, [name])
    assert len(found["partitions"]) == 2
    assert {len(one["replicas"]) for one in found["partitions"]} == {3}
    assert configs[name]["min.insync.replicas"] == "2"
    assert configs[name]["retention.ms"] == "-1"


async def test_a_setting_that_differs_is_told_and_mended(replicated: Settings) -> None:
    await applied(replicated)
    name = replicated.topics.of(topics.LEDGER)
    await configure(replicated, name, {"retention.ms": "1000", "min.insync.replicas": "2"})
    (difference,) = [one for one in await provision.plan(replicated) if one.what == "retention.ms"]
    assert difference == Difference(topic=name, what="retention.ms", wanted="-1", found="1000")
    await applied(replicated)
    assert await provision.plan(replicated) == []


async def test_a_setting_the_manifest_does_not_name_is_left_alone(replicated: Settings) -> None:
    await applied(replicated)
    name = replicated.topics.of(topics.LEDGER)
    await configure(replicated, name, {"retention.ms": "1000", "flush.messages": "7"})
    await applied(replicated)
    left = await overrides(replicated, name)
    assert left["flush.messages"] == "7"
    assert left["retention.ms"] == "-1"


async def test_a_setting_the_broker_refuses_is_an_error(
    replicated: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await applied(replicated)
    monkeypatch.setattr(provision, "wanted_config", lambda topic, settings: {"segment.ms": "no"})
    with pytest.raises(ProvisionError, match=r"cannot be changed: Invalid value no"):
        await provision.apply(replicated)


async def test_another_partition_count_is_refused_and_nothing_is_changed(
    replicated: Settings,
) -> None:
    await applied(replicated)
    name = replicated.topics.of(topics.LEDGER)
    await configure(replicated, name, {"retention.ms": "1000"})
    other = msgspec.structs.replace(replicated, partitions=3)
    with pytest.raises(ProvisionError, match="never changes in place"):
        await provision.apply(other)
    found = {one.what: one.found for one in await provision.plan(replicated) if one.topic == name}
    assert found["retention.ms"] == "1000"


async def test_fewer_copies_than_wanted_are_told_with_the_remedy(replicated: Settings) -> None:
    await applied(msgspec.structs.replace(replicated, replication=1))
    differences = await provision.plan(replicated)
    assert {one.found for one in differences if one.what == "replication"} == {"1"}
    with pytest.raises(ProvisionError, match="kafka-reassign-partitions"):
        await provision.apply(replicated)


async def test_removing_a_namespace_leaves_the_others(replicated: Settings) -> None:
    other = msgspec.structs.replace(replicated, namespace=f"t-{secrets.token_hex(4)}-")
    await applied(replicated)
    await applied(other)
    await provision.remove_namespace(other)
    async with provision._Admin(replicated) as admin:
        deadline = monotonic() + 30
        while await names_on(admin, other.namespace):
            assert monotonic() < deadline, "topics are still there"
        assert len(await names_on(admin, replicated.namespace)) == len(topics.MANIFEST)


@pytest.mark.parametrize("namespace", ["", "demo-", "prod-"])
async def test_only_test_namespaces_are_ever_removed(replicated: Settings, namespace: str) -> None:
    with pytest.raises(ProvisionError, match="nothing is deleted"):
        await provision.remove_namespace(msgspec.structs.replace(replicated, namespace=namespace))


async def test_one_sentence_says_that_no_broker_is_there() -> None:
    away = Settings(broker=f"127.0.0.1:{broker.free_port()}")
    with pytest.raises(BrokerAwayError, match=rf"No broker at {away.broker}\. "):
        await provision.plan(away)
