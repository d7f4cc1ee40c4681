"""Topics as the manifest wants them: what is missing, what differs, and making it so."""

import asyncio
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from msgspec import Struct

from schemas import topics
from streams.engine.kafka import connection
from streams.settings import Settings

TIMEOUT_MS: Final = 30_000
_VISIBLE_WITHIN_S: Final = 30


class BrokerAwayError(Exception):
    """No broker answers (exit code 69). The text says where and what next."""

    def __init__(self, broker: str) -> None:
        super().__init__(
            f"No broker at {broker}. Start one with `credits demo`, or set CREDITS_BROKER."
        )


class ProvisionError(Exception):
    """The topics cannot be made as they should be; the text says why and what next."""


class Difference(Struct, frozen=True, kw_only=True):
    """What is not as the manifest wants it. `what` is missing, partitions, replication or a
    configuration's name; `remedy` is None when `apply` mends it."""

    topic: str
    what: str
    wanted: str
    found: str | None = None
    remedy: str | None = None


class _Admin:
    """An admin client that says in our words when the broker is away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = AIOKafkaAdminClient(
            **connection(settings), request_timeout_ms=TIMEOUT_MS, client_id=settings.app_id
        )

    async def __aenter__(self) -> AIOKafkaAdminClient:
        try:
            await self._client.start()
        except (KafkaError, OSError):
            await self._client.close()
            raise BrokerAwayError(self._settings.broker) from None
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


def wanted_config(topic: topics.Topic, settings: Settings) -> dict[str, str]:
    """A topic's configuration in an installation: replicated topics need two in sync."""
    more = {"min.insync.replicas": "2"} if settings.replication >= 3 else {}
    return {**topic.config, **more}


async def plan(settings: Settings) -> list[Difference]:
    """Everything that differs from the manifest. Raises BrokerAwayError."""
    async with _Admin(settings) as admin:
        return await _plan(admin, settings)


async def _plan(admin: AIOKafkaAdminClient, settings: Settings) -> list[Difference]:
    names = {settings.topics.of(topic.name): topic for topic in topics.MANIFEST}
    described = await _describe(admin, list(names))
    differences: list[Difference] = []
    for name, topic in names.items():
        found = described.get(name)
        if found is None:
            differences.append(
                Difference(topic=name, what="missing", wanted=f"{_partitions(topic, settings)}")
            )
            continue
        differences += _shape(name, topic, found, settings)
    existing = [name for name in names if name in described]
    configs = await _configs(admin, existing)
    for name in existing:
        for key, value in wanted_config(names[name], settings).items():
            if configs[name].get(key) != value:
                differences.append(
                    Difference(topic=name, what=key, wanted=value, found=configs[name].get(key))
                )
    return differences


def _partitions(topic: topics.Topic, settings: Settings) -> int:
    return topic.partitions or settings.partitions


def _shape(
    name: str, topic: topics.Topic, found: dict[str, Any], settings: Settings
) -> list[Difference]:
    differences = []
    count = len(found["partitions"])
    if count != _partitions(topic, settings):
        differences.append(
            Difference(
                topic=name,
                what="partitions",
                wanted=str(_partitions(topic, settings)),
                found=str(count),
                remedy="A partition count never changes in place: keys would move and balances "
                "with them. Set CREDITS_PARTITIONS to what the topics have, or use another "
                "CREDITS_NAMESPACE.",
            )
        )
    copies = min((len(one["replicas"]) for one in found["partitions"]), default=0)
    if copies < settings.replication:
        differences.append(
            Difference(
                topic=name,
                what="replication",
                wanted=str(settings.replication),
                found=str(copies),
                remedy="Reassign the partitions with kafka-reassign-partitions.sh.",
            )
        )
    return differences


async def _describe(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, Any]]:
    return {
        found["topic"]: found
        for found in await admin.describe_topics(names)
        if not found["error_code"]
    }


async def _configs(
    admin: AIOKafkaAdminClient, names: list[str]
) -> dict[str, dict[str, str | None]]:
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    configs: dict[str, dict[str, str | None]] = {}
    for response in await admin.describe_configs(resources):
        for resource in response.resources:
            configs[resource[3]] = {entry[0]: entry[1] for entry in resource[4]}
    return configs


async def apply(settings: Settings) -> list[Difference]:
    """Create what is missing and set what differs; return what was done.

    Raises BrokerAwayError, and ProvisionError when something cannot be mended: then nothing is
    changed.
    """
    async with _Admin(settings) as admin:
        differences = await _plan(admin, settings)
        for difference in differences:
            if difference.remedy is not None:
                raise ProvisionError(
                    f"{difference.topic} has {difference.what} {difference.found}, wanted "
                    f"{difference.wanted}. {difference.remedy}"
                )
        names = {settings.topics.of(topic.name): topic for topic in topics.MANIFEST}
        missing = [one.topic for one in differences if one.what == "missing"]
        if missing:
            await _create(admin, settings, {name: names[name] for name in missing})
        changed = {one.topic for one in differences if one.what != "missing"}
        if changed:
            await admin.alter_configs(
                [
                    ConfigResource(
                        ConfigResourceType.TOPIC,
                        name,
                        configs=wanted_config(names[name], settings),
                    )
                    for name in sorted(changed)
                ]
            )
        return differences


async def _create(
    admin: AIOKafkaAdminClient, settings: Settings, missing: dict[str, topics.Topic]
) -> None:
    response = await admin.create_topics(
        [
            NewTopic(
                name=name,
                num_partitions=_partitions(topic, settings),
                replication_factor=settings.replication,
                topic_configs=wanted_config(topic, settings),
            )
            for name, topic in missing.items()
        ],
        timeout_ms=TIMEOUT_MS,
    )
    for name, code, *text in response.topic_errors:
        if code not in (0, 36):  # 36: somebody else created it in between
            raise ProvisionError(f"{name} cannot be created: {text[0] if text else code}")
    async with asyncio.timeout(_VISIBLE_WITHIN_S):
        while len(await _describe(admin, list(missing))) < len(missing):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # another process makes them visible, no event of ours


async def remove_namespace(settings: Settings) -> None:
    """Delete every topic of a test namespace. Refuses any other: it would delete balances."""
    if not settings.namespace.startswith("t-"):
        raise ProvisionError(f"{settings.namespace!r} is no test namespace; nothing is deleted")
    async with _Admin(settings) as admin:
        names = [name for name in await admin.list_topics() if name.startswith(settings.namespace)]
        if names:
            await admin.delete_topics(names, timeout_ms=TIMEOUT_MS)
