"""Kafka's consumer, which everything here reads with."""

import asyncio

from aiokafka import AIOKafkaConsumer


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    """The client's consumer, but it can be ended, and told to rest, at any moment."""

    def unsubscribe(self) -> None:
        """Read nothing until partitions are assigned again; not for members of a group."""
        # The client's own takes the subscription away. A fetcher that was just told of one, and has
        # not looked yet, does not survive that, and nothing would ever be read again.
        self.assign([])

    async def stop(self) -> None:
        """Leave the group, if there is one, and disconnect."""
        # The client cancels tasks of its own and waits for them. One that has not begun yet, and
        # one that rests after a failed fetch, raise that into whoever ends the consumer.
        await asyncio.sleep(0)
        try:
            await super().stop()
        except asyncio.CancelledError:
            fetcher = self._fetcher
            tasks = [] if fetcher is None else [fetcher._fetch_task, *fetcher._pending_tasks]  # noqa: SLF001
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
