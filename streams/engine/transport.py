"""Faust's transport, with batches: Faust keeps the group, our reader fetches.

Faust's own consumer holds the membership (heartbeats, assignment, rebalance signals) and never
fetches; what the reader fetched goes to the agents as one message a topic. Names of Faust's that
are private are used here and nowhere else, with the version pinned and a test that watches them.
"""

import asyncio
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from faust.tables.manager import TableManager as FaustTableManager
from faust.tables.recovery import Recovery as FaustRecovery
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.transport.drivers.aiokafka import Consumer as FaustConsumer
from faust.transport.drivers.aiokafka import Transport as FaustTransport
from faust.types import TP, ConsumerMessage
from mode import Service

if TYPE_CHECKING:
    from streams.engine.shards import Shards

# A member that never polls leaves the group after the poll interval and never comes back.
_POLL_EVERY_S: Final = 3.0


def _shards(app: Any) -> "Shards":
    return cast("Shards", app.shards)


def is_member(app: Any) -> bool:
    """Whether Faust's consumer is in its group: it has joined, and its heartbeats go on."""
    thread = getattr(app._consumer, "_thread", None)  # noqa: SLF001
    client = getattr(thread, "_consumer", None)
    coordinator = getattr(client, "_coordinator", None)
    if coordinator is None or coordinator.coordinator_id is None or coordinator.generation < 0:
        return False
    heartbeats = coordinator._heartbeat_task  # noqa: SLF001
    return heartbeats is not None and not heartbeats.done()


class ConsumerThread(AIOKafkaConsumerThread):
    """Holds the group membership; its fetches bring nothing."""

    async def _fetch_records(self, consumer: Any, *_: Any, **__: Any) -> dict[TP, list[Any]]:
        # A leader whose broker has just come back may know no partitions yet. It then assigns
        # none to anybody, and would only look again when its metadata is five minutes old.
        cluster = consumer._client.cluster  # noqa: SLF001
        if not all(cluster.partitions_for_topic(topic) for topic in consumer.subscription()):
            await consumer._client.force_metadata_update()  # noqa: SLF001
        with consumer._fetcher._subscriptions.fetch_context():  # noqa: SLF001
            consumer.pause(*consumer.assignment())
        return {}


class Consumer(FaustConsumer):
    """Delivers the reader's slices; commits nothing, for the shards commit in transactions."""

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    @Service.task
    async def _stay_in_group(self) -> None:
        while not self.should_stop:
            # Faust starts this task beside the thread that makes the client.
            if self._thread._consumer is not None:  # noqa: SLF001
                await self._getmany(set(), 0.0)
            await self.sleep(_POLL_EVERY_S)

    async def perform_seek(self) -> None:
        """Nothing to seek: the shards' positions decide what is read."""

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit nothing: offsets travel in the shards' transactions."""
        return False

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's detectors watch a consumer that does not fetch; ours watch the shards."""

    async def _drain_messages(self, fetcher: Any) -> None:
        shards = _shards(self.app)
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active:
                    await self.wait_first(self.can_resume_flow.wait(), timeout=1.0)
                    continue
                for topic, parts in groupby(await shards.fetch(), lambda part: part.tp.topic):
                    fetched = list(parts)
                    tp = TP(topic, fetched[0].tp.partition)
                    first = fetched[0].records[0]
                    # Faust takes 0.1 ms for a message, however large: its value is not bytes but
                    # the slices of all partitions.
                    message = ConsumerMessage(
                        tp.topic,
                        tp.partition,
                        first.offset,
                        first.timestamp / 1000,
                        0,  # what kind of timestamp it is, which nobody asks
                        None,
                        None,
                        cast("bytes", fetched),
                        None,
                        0,
                        0,
                        tp,
                        generation_id=self.app.consumer_generation_id,
                    )
                    # While flow is suspended it is dropped here; the chains show it.
                    await self.wait_first(self.callback(message), self.suspend_flow.wait())
        except asyncio.CancelledError:
            if self.app.should_stop:
                return
            raise
        except Exception as error:  # Faust would only log it and read no more
            shards.give_up(f"reading the sources failed: {type(error).__name__}: {error}")


class Transport(FaustTransport):
    """Faust's aiokafka transport with our consumer."""

    Consumer: ClassVar[type] = Consumer


class Recovery(FaustRecovery):
    """No recovery by Faust: shards restore themselves, in bulk and by position."""

    def need_recovery(self) -> bool:
        """Never."""
        return False

    async def _build_highwaters(self, *_: Any, **__: Any) -> None:
        """Faust asks for what only its own recovery needs."""

    async def _build_offsets(self, *_: Any, **__: Any) -> None:
        """As above."""

    async def _seek_offsets(self, *_: Any, **__: Any) -> None:
        """As above."""

    async def on_recovery_completed(self, generation_id: int = 0) -> None:
        """The only moment at which Faust will not clear the agents' queues again: here the
        shards learn their partitions and a new epoch may begin."""
        await super().on_recovery_completed(generation_id)
        if self.app.consumer_generation_id == generation_id:
            _shards(self.app).assigned(self.app.consumer.assignment(), generation_id)


class TableManager(FaustTableManager):
    """Faust's table manager without its recovery."""

    @property
    def recovery(self) -> Recovery:
        """Ours."""
        if self._recovery is None:
            self._recovery = Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return cast("Recovery", self._recovery)
