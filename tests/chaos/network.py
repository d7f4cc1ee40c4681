"""A network that can be made bad: one forwarder in front of each node of a cluster.

It knows just enough of Kafka's protocol to tell requests and answers apart: a frame is a length and
so many bytes; a request begins with its kind and carries a number that its answer begins with.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Final

PRODUCE: Final = 0
INIT_PRODUCER_ID: Final = 22
ADD_PARTITIONS: Final = 24
END_TXN: Final = 26
TXN_OFFSET_COMMIT: Final = 28
_BUFFER: Final = 1 << 20
_LAST_ANSWER_S: Final = 2


class Network:
    """Forwards from the ports in front to the nodes behind, as badly as it is told to.

    `ports`: by node, where to listen; `behind`: by node, where to forward. What happened is in
    `counts`.
    """

    def __init__(self, ports: Mapping[int, int], behind: Mapping[int, int]) -> None:
        self._routes = {ports[node]: behind[node] for node in ports}
        self._servers: list[asyncio.Server] = []
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        self.held = asyncio.Event()
        self._flowing = {True: asyncio.Event(), False: asyncio.Event()}
        self.clear()

    @property
    def bootstrap(self) -> str:
        """host:port of every front, by comma."""
        return ",".join(f"127.0.0.1:{port}" for port in self._routes)

    def clear(self) -> None:
        """Good weather again, for what comes from now on.

        `lose`: by kind, how many answers never arrive and break their connection. `hold`: by
        kind, for how long to keep a request on the way, and how many; `hold_and_reset`: its client
        loses the connection meanwhile.
        """
        self.latency_s = 0.0
        self.lose: dict[int, int] = {}
        self.hold: dict[int, tuple[float, int]] = {}
        self.hold_and_reset = False
        self.held.clear()
        for flowing in self._flowing.values():
            flowing.set()

    def cut(self, *, up: bool) -> None:
        """Let nothing more through in one direction (`up`: from workers to brokers)."""
        self._flowing[up].clear()

    def flows(self, *, up: bool) -> asyncio.Event:
        """Set while a direction is open."""
        return self._flowing[up]

    def reset(self) -> int:
        """Break every connection; how many there were."""
        links = list(self._links)
        for link in links:
            link.abort()
        self.counts["connections_reset"] += len(links)
        return len(links)

    async def start(self) -> None:
        """Listen."""
        for port, behind in self._routes.items():
            self._servers.append(
                await asyncio.start_server(
                    partial(self._accept, behind),
                    "127.0.0.1",
                    port,
                    limit=_BUFFER,
                )
            )

    async def stop(self) -> None:
        """Stop listening, break everything."""
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(
        self, behind: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            try:
                from_node, to_node = await asyncio.open_connection(
                    "127.0.0.1", behind, limit=_BUFFER
                )
            except OSError:  # the node is down, and so is its front
                writer.transport.abort()
                return
            link = _Link(self, reader, writer, from_node, to_node)
            self._links.add(link)
            try:
                await link.run()
            finally:
                self._links.discard(link)
                link.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)


class _Link:
    """One connection of a client, and the one to its node."""

    def __init__(
        self,
        network: Network,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_node: asyncio.StreamReader,
        to_node: asyncio.StreamWriter,
    ) -> None:
        self._network = network
        self._from_client, self._to_client = from_client, to_client
        self._from_node, self._to_node = from_node, to_node
        self._kinds: dict[bytes, int] = {}
        self._held: set[bytes] = set()

    def abort(self) -> None:
        """Reset both connections."""
        self._to_client.transport.abort()
        self._to_node.transport.abort()

    async def run(self) -> None:
        """Forward until either side ends."""
        up = asyncio.ensure_future(self._requests())
        down = asyncio.ensure_future(self._answers())
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if up.done() and self._kinds:
                # The client is gone. What it sent last must still get there, not be swept away
                # by a reset: that is what a late request is.
                await asyncio.wait({down}, timeout=_LAST_ANSWER_S)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _requests(self) -> None:
        network = self._network
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(self._from_client)
                kind = int.from_bytes(frame[4:6], "big")
                self._kinds[frame[8:12]] = kind
                await network.flows(up=True).wait()
                if network.latency_s:
                    await asyncio.sleep(network.latency_s)
                seconds, times = network.hold.get(kind, (0.0, 0))
                if times:
                    network.hold[kind] = (seconds, times - 1)
                    self._held.add(frame[8:12])
                    await self._hold(seconds)
                self._to_node.write(frame)
                await self._to_node.drain()

    async def _hold(self, seconds: float) -> None:
        """Keep a request on the way; its client may lose patience meanwhile, or its connection."""
        network = self._network
        network.counts["requests_held"] += 1
        network.held.set()
        if network.hold_and_reset:
            self._to_client.transport.abort()
        await asyncio.sleep(seconds)

    async def _answers(self) -> None:
        network = self._network
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(self._from_node)
                kind = self._kinds.pop(frame[4:8], -1)
                if frame[4:8] in self._held:
                    network.counts["held_requests_answered"] += 1
                await network.flows(up=False).wait()
                if network.lose.get(kind, 0) > 0:
                    # The node has done it; the client never hears so.
                    network.lose[kind] -= 1
                    network.counts["answers_lost"] += 1
                    return
                if network.latency_s:
                    await asyncio.sleep(network.latency_s)
                if not self._to_client.is_closing():
                    self._to_client.write(frame)
                    await self._to_client.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big"))
