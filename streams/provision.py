"""Topics as the manifest wants them: what is missing, what differs, and making it so."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NodeNotReadyError,
    NoError,
    RequestTimedOutError,
    UnknownTopicOrPartitionError,
    for_code,
)
from msgspec import Struct

from schemas import topics
from streams.engine.kafka import connection
from streams.settings import Settings

TIMEOUT_MS: Final = 30_000
_VISIBLE_WITHIN_S: Final = 30
# A node hears of a topic that another has just created within a moment.
_HEARD_WITHIN_S: Final = 3
# How aiokafka says that nobody answers.
_AWAY: Final = (KafkaConnectionError, KafkaTimeoutError, NodeNotReadyError, RequestTimedOutError)
# Kafka's number for where a value comes from: set on the topic itself.
_SET_ON_TOPIC: Final = 1


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

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self._client.close()
        if isinstance(error, _AWAY):
            raise BrokerAwayError(self._settings.broker) from None


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
    described = {}
    for found in await admin.describe_topics(names):
        error = for_code(found["error_code"])
        if error is NoError:
            described[found["topic"]] = found
        elif error is not UnknownTopicOrPartitionError:
            raise ProvisionError(f"{found['topic']} cannot be described: {error.__name__}")
    return described


async def _configs(
    admin: AIOKafkaAdminClient, names: list[str], *, overrides_only: bool = False
) -> dict[str, dict[str, str | None]]:
    """The configurations by topic; `overrides_only` leaves out what comes from the cluster."""
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    configs: dict[str, dict[str, str | None]] = {}
    for response in await admin.describe_configs(resources):
        for resource in response.resources:
            code, text, _, name, entries = resource
            # A node that has not heard of a new topic yet: nothing is set there so far.
            if code not in (NoError.errno, UnknownTopicOrPartitionError.errno):
                raise ProvisionError(f"{name} cannot be described: {text or code}")
            configs[name] = {
                entry[0]: entry[1]
                for entry in entries
                if not overrides_only or entry[3] == _SET_ON_TOPIC
            }
    return configs


async def require(settings: Settings, names: Sequence[str]) -> None:
    """Return when all these topics are there with this installation's partition count.

    Raises BrokerAwayError, and ProvisionError that says what to do.
    """
    async with _Admin(settings) as admin:
        deadline = monotonic() + _HEARD_WITHIN_S
        while True:
            described = await _describe(admin, list(names))
            missing = [name for name in names if name not in described]
            if not missing or monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ProvisionError(
            f"No topic {missing[0]}{more} on {settings.broker}. Create it with `credits topics "
            "apply`, or set CREDITS_NAMESPACE to the installation you mean."
        )
    fixed = {settings.topics.of(topic.name) for topic in topics.MANIFEST if topic.partitions}
    for name in names:
        count = len(described[name]["partitions"])
        if name not in fixed and count != settings.partitions:
            raise ProvisionError(
                f"not_copartitioned: {name} has {count} partitions, this installation "
                f"{settings.partitions}. Set CREDITS_PARTITIONS={count}, or CREDITS_NAMESPACE to "
                "the installation you mean; a count never changes in place."
            )


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
            await _alter(admin, settings, {name: names[name] for name in sorted(changed)})
        deadline = monotonic() + _VISIBLE_WITHIN_S
        while left := await _plan(admin, settings):  # other nodes learn of it a little later
            if monotonic() > deadline:
                raise ProvisionError(
                    f"{left[0].topic}: {left[0].what} is still {left[0].found}, wanted "
                    f"{left[0].wanted}. Does something else change the topics?"
                )
            await asyncio.sleep(0.1)
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


async def _alter(
    admin: AIOKafkaAdminClient, settings: Settings, changed: dict[str, topics.Topic]
) -> None:
    # The request replaces all that a topic overrides: what others set there must go along.
    overridden = await _configs(admin, list(changed), overrides_only=True)
    resources = [
        ConfigResource(
            ConfigResourceType.TOPIC,
            name,
            configs={**overridden[name], **wanted_config(topic, settings)},
        )
        for name, topic in changed.items()
    ]
    for response in await admin.alter_configs(resources):
        for code, text, _, name in response.resources:
            if code:
                raise ProvisionError(f"{name} cannot be changed: {text or code}")


async def remove_namespace(settings: Settings) -> None:
    """Delete every topic of a test namespace. Refuses any other: it would delete balances."""
    if not settings.namespace.startswith("t-"):
        raise ProvisionError(f"{settings.namespace!r} is no test namespace; nothing is deleted")
    async with _Admin(settings) as admin:
        names = [name for name in await admin.list_topics() if name.startswith(settings.namespace)]
        if names:
            await admin.delete_topics(names, timeout_ms=TIMEOUT_MS)
