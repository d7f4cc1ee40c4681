"""The testbed's own Kafka: what it promises to the tests that stand on it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streams.testbed import broker
from streams.testbed.broker import BrokerError, Cluster

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(
        broker.external() is not None and shutil.which("java") is None,
        reason="no Java here; the other tests use the cluster of CREDITS_TEST_BROKER",
    ),
]
ROOT = Path(__file__).parents[2]
TOPIC = "kept"


def wait_until(condition: Callable[[], bool], within_s: float = 30) -> None:
    deadline = monotonic() + within_s
    while not condition():
        assert monotonic() < deadline, "waited in vain"
        sleep(0.05)


def processes_in(folder: Path) -> set[int]:
    """The processes whose command line names a folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found - {os.getpid()}


def node_ids(cluster: Cluster) -> list[int]:
    return [node.pid for node in cluster._nodes]


def answers(bootstrap: str) -> bool:
    """Whether a node answers a request, not only accepts a connection."""
    return broker._names_a_controller(int(bootstrap.rpartition(":")[2]))


async def create_topic(cluster: Cluster, copies: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(TOPIC, 1, copies)])
    finally:
        await admin.close()


async def write(cluster: Cluster, *values: bytes, **more: Any) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=cluster.bootstrap, acks="all", **more)
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(TOPIC, value)
    finally:
        await producer.stop()


async def read(cluster: Cluster, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(TOPIC, 0)])
        await consumer.seek_to_beginning()
        return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name has spaces, for the nodes of `lone`."""
    return tmp_path_factory.mktemp("lone") / "a folder with spaces"


@pytest.fixture(scope="module")
def lone(spaced: Path) -> Iterator[Cluster]:
    """One node, which runs again after every test."""
    with Cluster.start(spaced) as cluster:
        yield cluster


async def test_a_killed_node_keeps_what_it_acknowledged(lone: Cluster) -> None:
    before = lone.bootstrap
    await create_topic(lone, copies=1)
    await write(lone, b"1", b"2")
    lone.kill()
    assert not answers(before)
    lone.restart()
    assert lone.bootstrap == before
    await write(lone, b"3")
    assert await read(lone, 3) == [b"1", b"2", b"3"]


def test_a_frozen_node_is_silent_until_it_is_thawed(lone: Cluster) -> None:
    lone.freeze()
    try:
        assert not answers(lone.bootstrap)
    finally:
        lone.thaw()
    wait_until(lambda: answers(lone.bootstrap))


def test_all_a_node_says_goes_to_its_log(lone: Cluster, spaced: Path) -> None:
    (node,) = node_ids(lone)
    # A pipe that nobody reads would stop the node after 64 KiB of warnings.
    said = {Path(f"/proc/{node}/fd/{descriptor}").resolve() for descriptor in (1, 2)}
    assert said == {spaced / "node-0" / "log"}


def test_a_stopped_cluster_was_shut_down_in_order_and_leaves_no_process(tmp_path: Path) -> None:
    cluster = Cluster.start(tmp_path)
    assert processes_in(tmp_path)
    cluster.stop()
    assert (tmp_path / "node-0" / "data" / ".kafka_cleanshutdown").exists()
    assert not processes_in(tmp_path)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_node_outlives_the_program_that_started_it(
    tmp_path: Path, death: signal.Signals
) -> None:
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys; from pathlib import Path; from time import sleep\n"
            # Whoever was started in the background of a shell does not hear it otherwise.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from streams.testbed.broker import Cluster\n"
            "with Cluster.start(Path(sys.argv[1])): print('ready', flush=True); sleep(600)",
            str(tmp_path),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "ready\n"
        assert len(processes_in(tmp_path)) > 1
        program.send_signal(death)
        program.wait(30)
        wait_until(lambda: not processes_in(tmp_path))
    finally:
        program.kill()
        program.stdout.close()
        program.wait()


def test_a_node_that_ends_while_starting_is_told_at_once(tmp_path: Path) -> None:
    began = monotonic()
    with pytest.raises(BrokerError, match="ended while starting; see"):
        Cluster.start(tmp_path, properties={"metric.reporters": "no.such.Class"})
    assert monotonic() - began < broker.READY_WITHIN_S / 2
    assert not processes_in(tmp_path)


async def test_three_nodes_lose_one_and_go_on(tmp_path: Path) -> None:
    with Cluster.start(tmp_path, nodes=3) as cluster:
        await create_topic(cluster, copies=3)
        await write(cluster, b"1")
        for node in range(3):
            cluster.kill(node)
            await write(cluster, str(node + 2).encode())
            cluster.restart(node)
        assert await read(cluster, 4) == [b"1", b"2", b"3", b"4"]
        began = monotonic()
        cluster.stop()
        # One deadline for all: the last controllers have no quorum to take leave of.
        assert monotonic() - began < 1.5 * broker.STOP_WITHIN_S


def test_without_java_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError) as refused:
        Cluster.start(tmp_path / "cluster")
    assert "\n" not in str(refused.value)
    assert "openjdk-17-jre-headless" in str(refused.value)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", broker.free_port())):
        pass


def test_a_port_is_given_to_one_process_at_a_time() -> None:
    port = broker.free_port()
    assert not broker.reserve(port)
    code = f"from streams.testbed import broker; print(broker.reserve({port}), broker.free_port())"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    refused, given = other.stdout.split()
    assert refused == "False"
    assert broker.reserve(int(given)), "whoever had it has ended"


async def test_what_a_node_unpacks_goes_with_its_folder(tmp_path: Path) -> None:
    with Cluster.start(tmp_path) as cluster:
        await create_topic(cluster, copies=1)
        await write(cluster, b"x" * 1_000, compression_type="lz4")
        assert list((tmp_path / "node-0").glob("liblz4-java-*.so"))
