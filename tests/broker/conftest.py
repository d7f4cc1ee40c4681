"""An installation of its own for every test that runs workers."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from streams import provision
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.broker import Cluster
from tests.broker.harness import Worker


@pytest.fixture
async def installation(settings: Settings) -> Settings:
    """Topics in a fresh namespace, four partitions, short waits."""
    await provision.apply(settings)
    return settings


@pytest.fixture
def workers(installation: Settings, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Make workers; whatever the test does, none is left behind."""
    made: list[Worker] = []

    def make(name: str = "worker", *, module: str = "streams", **changes: object) -> Worker:

        settings = msgspec.structs.replace(installation, **changes)
        worker = Worker(settings, tmp_path, name, module=module)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.kill()


@pytest.fixture
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Settings]]:
    """A broker that a test may kill, with an installation on it."""
    if broker.external() is not None:
        pytest.skip("kills its broker, so it needs one of its own")
    with Cluster.start(tmp_path_factory.mktemp("own")) as cluster:
        own = Settings(broker=cluster.bootstrap, namespace="t-own-", partitions=4, linger_ms=20)
        asyncio.run(provision.apply(own))
        yield cluster, own
