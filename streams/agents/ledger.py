"""The Faust agent through which every source record enters."""

from typing import Any

from streams.engine.shards import Shards


def ledger_agent(shards: Shards) -> Any:
    """An agent that gives each slice to its shard. The shard's own task books it: awaiting the
    batch here would make all shards wait for one another."""

    async def ledger(stream: Any) -> None:
        async for part in stream:
            shards.deliver(part)

    return ledger
