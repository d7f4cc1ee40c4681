"""The Faust agent through which every source record enters."""

from typing import Any

from streams.engine.shards import Shards


def ledger_agent(shards: Shards) -> Any:
    """An agent that gives the slices of each fetch to their shards. A shard's own task books them:
    awaiting the batch here would make all shards wait for one another."""

    async def ledger(stream: Any) -> None:
        async for slices in stream:
            for part in slices:
                shards.deliver(part)

    return ledger
