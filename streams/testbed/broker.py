"""A real Kafka on this machine, from Maven's jars: for the demo, the tests and the benchmark.

Every node is a child process in a session of its own, on loopback, with its own folder. It dies
with its parent, however that ends: a guard process holds a pipe of the parent and kills the node
when the pipe closes.
"""

import base64
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Self

KAFKA_VERSION: Final = "4.2.1"
EXTERNAL: Final = "CREDITS_TEST_BROKER"
READY_WITHIN_S: Final = 60
STOP_WITHIN_S: Final = 15
FREEZE_WITHIN_S: Final = 5
_POM: Final = Path(__file__).parents[2] / "deploy" / "kafka"
# Fifty files are fetched; what has come is kept, and what has not is asked for again.
MAVEN_TRIES: Final = 3

# Kills the node when the parent's end of the pipe closes: after a SIGKILL of the parent too. Ends
# when the node ends, so that the parent can ask the guard whether the node lives.
_GUARD: Final = """
import os, signal, subprocess, sys, threading
node = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=2)
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
def watch():
    while os.read(0, 1):
        pass
    node.kill()
threading.Thread(target=watch, daemon=True).start()
try:
    print(node.pid, flush=True)
    os.close(1)
finally:
    node.wait()
"""


class BrokerError(Exception):
    """No broker can be started here. The text says what, why and what next."""


def external() -> str | None:
    """The cluster that CREDITS_TEST_BROKER names, for tests, demo and benchmark only."""
    return os.environ.get(EXTERNAL) or None


def require_programs() -> None:
    """Raises BrokerError without Java or Maven."""
    missing = [name for name in ("java", "mvn") if shutil.which(name) is None]
    if missing:
        raise BrokerError(
            f"{' and '.join(missing)} not found; a real Kafka needs Java 17 and Maven. Install "
            "them with `apt-get install openjdk-17-jre-headless maven`, or use "
            "`docker compose up --wait`."
        )


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What Maven complained of first: what follows is only its advice."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line.removeprefix("[ERROR] ") for line in lines if line.startswith("[ERROR]")]
    return (errors or lines or [f"it ended with {done.returncode} and said nothing"])[0]


def fetch_jars(pom: Path = _POM / "pom.xml", name: str = f"kafka-{KAFKA_VERSION}") -> Path:
    """The folder with the jars that a pom names, the broker's unless told otherwise; fetched once,
    by one process at a time, and kept outside the checkout under that name.

    Raises BrokerError without Java or Maven, or when Maven fails.
    """
    require_programs()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "credits"
    jars = cache / name
    if jars.is_dir():
        return jars
    cache.mkdir(parents=True, exist_ok=True)
    # Maven's own store is not made for two at a time.
    with (cache / "fetching").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not jars.is_dir():
            _fetch(pom, name, cache, jars)
    return jars


def _fetch(pom: Path, name: str, cache: Path, jars: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as fetching:
        made = Path(fetching) / "jars"
        for _ in range(MAVEN_TRIES):  # one of many downloads may fail; the others are kept
            done = subprocess.run(  # noqa: S603
                [
                    shutil.which("mvn") or "mvn",
                    "-q",
                    "-B",
                    "-Dstyle.color=never",
                    "-f",
                    str(pom),
                    "dependency:copy-dependencies",
                    "-DincludeScope=runtime",
                    f"-DoutputDirectory={made}",
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0 and made.is_dir():
                break
        else:
            raise BrokerError(f"Maven could not fetch {name}: {_complaint(done)}")
        try:
            made.rename(jars)
        except OSError as error:
            raise BrokerError(f"{jars} cannot be made: {error}") from None


def free_port() -> int:
    """A port that nobody listens on at this moment, and that no other process of ours is given
    while this one lives: it may take seconds until somebody listens on it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if reserve(port):
                return port


def reserve(port: int) -> bool:
    """Keep a port for this process until it ends, however it ends; False when it is kept already.

    A name of the kernel's stands for it, which lasts as long as a socket is bound to it.
    """
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0credits-port-{port}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        name.detach()
        return True


def _kafka_uuid() -> str:
    """A random id in Kafka's form; never one that its tools would take for an option."""
    while True:
        made = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[:22]
        if not made.startswith("-"):
            return made


class _Node:
    """One broker and controller."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.folder = folder
        self.port = free_port()
        self.second_port = free_port()
        self.controller_port = free_port()
        self.guard: subprocess.Popen[bytes] | None = None
        self.pid = 0


class Cluster:
    """One or three real Kafka nodes. A context manager; leaving it stops them."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        properties: Mapping[str, str],
        front: Mapping[int, int] | None = None,
    ) -> None:
        folder = folder.absolute()  # every node runs in a folder of its own
        self._jars = fetch_jars()
        self._properties = dict(properties)
        self._front = dict(front or {})
        self._nodes = [_Node(number, folder / f"node-{number}") for number in range(nodes)]
        self._cluster_id = _kafka_uuid()

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        nodes: int = 1,
        properties: Mapping[str, str] | None = None,
        front: Mapping[int, int] | None = None,
    ) -> "Cluster":
        """Format and start; return when metadata names a controller.

        `front`, by node: the port of something that stands before the node. Each then has a second
        listener (`behind`) that sends its clients to that port. Raises BrokerError.
        """
        cluster = cls(folder, nodes, properties or {}, front)
        try:
            cluster._format()
            for node in cluster._nodes:
                cluster._launch(node)
            cluster.wait_ready()
        except BaseException:
            cluster.stop(kill=True)
            raise
        return cluster

    @property
    def bootstrap(self) -> str:
        """host:port of every node, by comma."""
        return ",".join(f"127.0.0.1:{node.port}" for node in self._nodes)

    @property
    def behind(self) -> dict[int, int]:
        """The port of each node's second listener, for what stands in front of it."""
        return {node.number: node.second_port for node in self._nodes if self._front}

    def pid(self, node: int = 0) -> int:
        """The process of a node."""
        return self._nodes[node].pid

    def running(self, node: int = 0) -> bool:
        """Whether a node's process lives."""
        guard = self._nodes[node].guard
        return guard is not None and guard.poll() is None

    @property
    def pids(self) -> list[int]:
        """The process of every running node."""
        return [node.pid for node in self._nodes if node.guard is not None]

    def _format(self) -> None:
        directories = {node.number: _kafka_uuid() for node in self._nodes}
        for node in self._nodes:
            node.folder.mkdir(parents=True, exist_ok=True)
            (node.folder / "server.properties").write_text(self._config(node))
            initial = (
                ["--standalone"]
                if len(self._nodes) == 1
                else [
                    "--initial-controllers",
                    ",".join(
                        f"{one.number}@127.0.0.1:{one.controller_port}:{directories[one.number]}"
                        for one in self._nodes
                    ),
                ]
            )
            done = subprocess.run(  # noqa: S603
                [
                    # It runs for a second: what a longer run gains by is not worth its cost here.
                    *self._java("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
                    "kafka.tools.StorageTool",
                    "format",
                    *initial,
                    "-t",
                    self._cluster_id,
                    "-c",
                    str(node.folder / "server.properties"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                (node.folder / "log").write_text(done.stdout + done.stderr)
                raise BrokerError(f"Kafka's storage cannot be formatted; see {node.folder / 'log'}")

    def _config(self, node: _Node) -> str:
        copies = min(3, len(self._nodes))
        in_sync = 2 if copies == 3 else 1
        bootstrap = ",".join(f"127.0.0.1:{one.controller_port}" for one in self._nodes)
        listeners = {"PLAINTEXT": node.port, "CONTROLLER": node.controller_port}
        advertised = dict(listeners)
        if self._front:
            listeners["FRONT"] = node.second_port
            advertised["FRONT"] = self._front[node.number]
        settings = {
            "process.roles": "broker,controller",
            "node.id": str(node.number),
            "controller.quorum.bootstrap.servers": bootstrap,
            "listeners": _addresses(listeners),
            "advertised.listeners": _addresses(advertised),
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in listeners),
            "log.dirs": str(node.folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "3",
            "offsets.topic.replication.factor": str(copies),
            "transaction.state.log.num.partitions": "3",
            "transaction.state.log.replication.factor": str(copies),
            "transaction.state.log.min.isr": str(in_sync),
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": str(copies),
            "share.coordinator.state.topic.min.isr": str(in_sync),
            "group.initial.rebalance.delay.ms": "0",
            # A node that died must be told from a slow one quickly: tests wait for it.
            "broker.session.timeout.ms": "6000",
            "log.cleaner.dedupe.buffer.size": "8388608",
            **self._properties,
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def _java(self, *options: str) -> list[str]:
        return [
            shutil.which("java") or "java",
            *options,
            "-cp",
            f"{self._jars}/*",
        ]

    def _launch(self, node: _Node) -> None:
        heap = "768m" if len(self._nodes) == 1 else "400m"
        command = [
            *self._java(
                "-Xms128m",
                f"-Xmx{heap}",
                "-XX:+UseSerialGC",
                f"-Dlog4j2.configurationFile={_POM / 'log4j2.properties'}",
                # What a killed process has unpacked goes with its folder.
                f"-Djava.io.tmpdir={node.folder}",
            ),
            "kafka.Kafka",
            str(node.folder / "server.properties"),
        ]
        with (node.folder / "log").open("ab") as log:
            node.guard = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", _GUARD, "guard", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                cwd=node.folder,
            )
            assert node.guard.stdout is not None
            node.pid = int(node.guard.stdout.readline() or b"0")
        if not node.pid:
            raise BrokerError(f"Kafka did not start; see {node.folder / 'log'}")

    def wait_ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Wait until every running node names a controller. Raises BrokerError."""
        deadline = monotonic() + within_s
        for node in self._nodes:
            while node.guard is not None and not _names_a_controller(node.port):
                if node.guard.poll() is not None:
                    raise BrokerError(f"Kafka ended while starting; see {node.folder / 'log'}")
                if monotonic() > deadline:
                    raise BrokerError(
                        f"Kafka was not ready within {within_s:.0f} s; see {node.folder / 'log'}"
                    )
                sleep(0.1)

    def kill(self, node: int = 0) -> None:
        """SIGKILL a node; what it acknowledged must be there after `restart`."""
        self._end(self._nodes[node], deadline=monotonic())

    def terminate(self, node: int = 0) -> None:
        """SIGTERM a node: it takes leave of its clients and the other nodes."""
        if self.running(node):
            os.kill(self._nodes[node].pid, signal.SIGTERM)
        self._end(self._nodes[node], monotonic() + STOP_WITHIN_S)

    def restart(self, node: int = 0) -> None:
        """Start a killed node again on its old data and port."""
        self._launch(self._nodes[node])
        self.wait_ready()

    def freeze(self, node: int = 0) -> None:
        """SIGSTOP a node; returns when none of its threads runs any more."""
        pid = self._nodes[node].pid
        os.kill(pid, signal.SIGSTOP)
        deadline = monotonic() + FREEZE_WITHIN_S
        while not _stopped(pid):
            if monotonic() > deadline:
                raise BrokerError(f"node {node} does not stop within {FREEZE_WITHIN_S} s")
            sleep(0.01)

    def thaw(self, node: int = 0) -> None:
        """SIGCONT a node."""
        os.kill(self._nodes[node].pid, signal.SIGCONT)

    def stop(self, *, kill: bool = False) -> None:
        """Stop all nodes, in order unless `kill`; the folder stays."""
        for node in self._nodes:
            if node.guard is not None and not kill:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(node.pid, signal.SIGTERM)
        # One deadline for all: the last of three controllers has no quorum to take leave of.
        deadline = monotonic() + (0 if kill else STOP_WITHIN_S)
        for node in self._nodes:
            self._end(node, deadline)

    def _end(self, node: _Node, deadline: float) -> None:
        guard, node.guard = node.guard, None
        if guard is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.wait(max(0, deadline - monotonic()))
        # The guard kills what is left, reaps it and ends.
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()
        guard.wait()
        guard.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(kill=kind is not None)


def _addresses(ports: Mapping[str, int]) -> str:
    return ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())


def _stopped(pid: int) -> bool:
    """Whether every thread is stopped; a signal's sender does not wait for that."""
    states = (stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)


def _names_a_controller(port: int) -> bool:
    """Ask one node for metadata, by hand (Metadata v1), and look for a controller."""
    request = b"\x00\x03\x00\x01\x00\x00\x00\x01\xff\xff\x00\x00\x00\x00"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.settimeout(2)
            connection.sendall(len(request).to_bytes(4, "big") + request)
            reply = b"".join(_exactly(connection))
    except OSError:
        return False
    count = int.from_bytes(reply[4:8], "big")
    at = 8
    for _ in range(count):
        at += 4
        at += 2 + int.from_bytes(reply[at : at + 2], "big")  # host
        at += 4
        rack = int.from_bytes(reply[at : at + 2], "big", signed=True)
        at += 2 + max(0, rack)
    return count > 0 and int.from_bytes(reply[at : at + 4], "big", signed=True) >= 0


def _exactly(connection: socket.socket) -> Iterator[bytes]:
    size = b""
    while len(size) < 4:
        more = connection.recv(4 - len(size))
        if not more:
            return
        size += more
    left = int.from_bytes(size, "big")
    while left:
        more = connection.recv(left)
        if not more:
            return
        left -= len(more)
        yield more
