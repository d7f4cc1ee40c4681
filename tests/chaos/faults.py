"""How each kind of fault is done. Every function returns when the fault is over and what it hit has
been started again; a fault that did not happen raises StuckError, for a campaign that only believes
it broke something proves nothing.
"""

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from schemas import topics
from streams.engine.kafka import transactional_producer
from tests.chaos import network
from tests.chaos.schedule import Fault
from tests.chaos.stage import CHANGELOG, SESSION_S, Slot, Stage, wait
from tests.chaos.worker import BATCH_POINTS, order, taken

# While brokers come and go there may be no batch for minutes.
POINT_WITHIN_S: Final = 300
TAKEN_OVER_WITHIN_S: Final = 300
_ANSWERS: Final = {
    "produce": network.PRODUCE,
    "offsets": network.TXN_OFFSET_COMMIT,
    "end": network.END_TXN,
    "init": network.INIT_PRODUCER_ID,
    "add": network.ADD_PARTITIONS,
}


def _number(fault: Fault, name: str) -> int:
    return int(fault.arguments[name])


async def do(stage: Stage, fault: Fault) -> None:
    """Do a fault. Raises StuckError when it does not come about or its end does not."""
    await FAULTS[fault.kind](stage, fault)
    stage.counts[f"faults_{fault.kind}"] += 1


# -- workers -------------------------------------------------------------------------------------


async def _kill(stage: Stage, fault: Fault) -> None:
    hit = [await stage.any_worker()]
    for slot in stage.running():
        if slot not in hit and len(hit) < _number(fault, "workers"):
            hit.append(slot)
    for slot in hit:
        stage.kill(slot)
    await stage.served(*hit)


async def _dies_at(stage: Stage, slot: Slot, point: str, passes: int) -> None:
    """Order a death at a point, and wait for it."""
    order(slot.folder, point, "kill", passes)
    await wait(lambda: taken(slot.folder), POINT_WITHIN_S, f"{slot.name} dies {point}")
    stage.watcher.lost(slot.partitions())
    stage.counts["sigkills"] += 1
    stage.points[point] += 1


async def _kill_at(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    await _dies_at(stage, slot, str(fault.arguments["point"]), _number(fault, "passes"))
    await stage.served(slot)


async def _kill_in_restore(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    slot.held = True
    try:
        stage.kill(slot)
        order(slot.folder, str(fault.arguments["point"]), "kill")
        slot.start()
        await wait(partial(_reached, stage, slot), POINT_WITHIN_S, f"{slot.name} dies in restore")
        stage.counts["sigkills"] += 1
        stage.points[str(fault.arguments["point"])] += 1
    finally:
        slot.held = False
    await stage.served(slot)


async def _kill_in_rebalance(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    point = str(fault.arguments["point"])
    dying = asyncio.ensure_future(_dies_at(stage, slot, point, 0))
    try:
        stage.spare.wanted = not stage.spare.wanted
        if not stage.spare.wanted and stage.spare is not slot:
            await stage.stop(stage.spare)
        await dying
        stage.counts["rebalances_died_in"] += 1
    finally:
        dying.cancel()
    await _back_to_base(stage)


async def _back_to_base(stage: Stage) -> None:
    for slot in stage.slots:
        slot.wanted = slot in stage.base
        if not slot.wanted:
            await stage.stop(slot)
    await stage.served(*stage.base)


async def _pause(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    slot.held = True
    try:
        slot.worker.signal(signal.SIGSTOP)
        stage.counts["pauses"] += 1
        await asyncio.sleep(_number(fault, "seconds"))
        slot.worker.signal(signal.SIGCONT)
    finally:
        slot.held = False
    await stage.served(slot)


async def _zombie(stage: Stage, fault: Fault) -> None:
    """Freeze some past their session, let others take over, thaw them."""
    await _two_run(stage)
    count = min(_number(fault, "workers"), len(stage.running()) - 1)
    frozen = stage.dice.sample(stage.running(), count)
    point = str(fault.arguments["point"])
    for slot in frozen:
        slot.held = True
    try:
        for slot in frozen:
            await wait(partial(_owns, slot), 60, f"{slot.name} has partitions")
            if point == "anywhere":
                slot.worker.signal(signal.SIGSTOP)
                continue
            order(slot.folder, point, "stop", _number(fault, "passes"))
            await wait(partial(_reached, stage, slot), POINT_WITHIN_S, f"{slot.name} stops {point}")
            stage.points[point] += 1
        await _taken_over(stage, frozen, monotonic())
        await asyncio.sleep(_number(fault, "longer"))
        marks = {slot.name: (slot.mark(), slot.partitions()) for slot in frozen}
        for slot in frozen:
            slot.worker.signal(signal.SIGCONT)
            stage.counts["zombies"] += 1
        for slot in frozen:
            mark, had = marks[slot.name]
            await _learns(stage, slot, mark, had if point in BATCH_POINTS else ())
    finally:
        for slot in frozen:
            if slot.running:
                slot.worker.signal(signal.SIGCONT)
            slot.held = False
    await _back_to_base(stage)


def _reached(stage: Stage, slot: Slot) -> bool:
    """Whether a held worker carried out its order. One that ended before, with its broker away,
    is started again for it."""
    if taken(slot.folder):
        return True
    stage.revive(slot)
    return False


def _owns(slot: Slot) -> bool:
    return bool(slot.partitions())


async def _two_run(stage: Stage) -> None:
    """Wait until at least two are ready that have partitions."""
    if len(stage.running()) < 2:
        stage.spare.wanted = True
    await wait(lambda: len(stage.running()) >= 2, 60, "two workers run")
    await stage.served(*stage.running())


async def _taken_over(stage: Stage, frozen: Sequence[Slot], since: float) -> None:
    """Wait until others book all that stopped workers had."""
    lost = sorted({one for slot in frozen for one in slot.partitions()})
    stage.watcher.lost(lost)
    await wait(
        lambda: all(stage.watcher.moved_at.get(one, 0) > since + 1 for one in lost),
        TAKEN_OVER_WITHIN_S,
        f"others book partitions {lost} of {', '.join(slot.name for slot in frozen)}",
    )


async def _learns(stage: Stage, slot: Slot, mark: int, booking: Sequence[int]) -> None:
    """Wait until a thawed worker knows that it has lost its partitions. One that stood between
    begin and commit, `booking` one of these, learns it by being fenced, or does not learn what
    became of its batch: it stood for longer than a commit may take, or its brokers have gone."""
    await wait(
        lambda: bool(not slot.running or slot.told(mark, "fenced") or slot.told(mark, "assigned")),
        90,
        f"{slot.name} learns that others have its partitions",
    )
    if not booking:
        return
    await wait(
        lambda: bool(
            not slot.running or slot.told(mark, "fenced") or _unknown(slot, mark, booking)
        ),
        60,
        f"{slot.name} throws its batch away",
    )
    if not slot.running or slot.told(mark, "fenced"):
        stage.counts["zombies_fenced"] += 1


# As a transaction says it (`Transactor`), not a restore.
_UNKNOWN: Final = re.compile(r"UnknownOutcomeError: (no answer within|\w+: )")


def _unknown(slot: Slot, mark: int, booking: Sequence[int]) -> bool:
    return any(
        line["partition"] in booking and _UNKNOWN.match(line["reason"])
        for line in slot.told(mark, "reopening")
    )


async def _term(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    await stage.served(slot)
    await stage.stop(slot, _number(fault, "times"))
    await stage.served(slot)


async def _storm(stage: Stage, fault: Fault) -> None:
    for _ in range(_number(fault, "kills")):
        stage.kill(await stage.any_worker())
        await asyncio.sleep(0.1 + stage.dice.random() * 0.9)
    await stage.served(*stage.base)


async def _scale(stage: Stage, _: Fault) -> None:
    for count in (1, len(stage.slots), 1):
        for slot in stage.slots:
            slot.wanted = slot in stage.slots[:count]
            if not slot.wanted:
                await stage.stop(slot)
        await stage.served(*stage.slots[:count])
    stage.counts["scalings"] += 1
    await _back_to_base(stage)


async def _rolling(stage: Stage, _: Fault) -> None:
    for slot in stage.base:
        await stage.stop(slot)
        await stage.served(slot)
    stage.counts["rolling_restarts"] += 1


async def _second_rebalance(stage: Stage, fault: Fault) -> None:
    """One joins, and before that has settled another dies."""
    slot = await stage.any_worker()
    stage.spare.wanted = True
    await wait(lambda: stage.spare.running, 30, "one more worker runs")
    mark = stage.spare.mark()
    await wait(lambda: bool(stage.spare.told(mark, "listening")), 60, "one more worker joins")
    await asyncio.sleep(_number(fault, "apart_ms") / 1000)
    stage.kill(slot)
    stage.counts["second_rebalances"] += 1
    await stage.served(slot)
    await _back_to_base(stage)


async def _payments_kill(stage: Stage, _: Fault) -> None:
    await wait(lambda: stage.payments.running, 30, "the payment service runs")
    stage.payments.kill()
    stage.counts["payment_services_killed"] += 1
    await wait(lambda: stage.payments.running, 30, "the payment service runs again")


async def _clock(stage: Stage, fault: Fault) -> None:
    slot = await stage.any_worker()
    path = slot.folder / "clock"
    made = slot.folder / "clock.new"
    made.write_text(str(_number(fault, "by")))
    made.rename(path)
    await asyncio.sleep(4)
    path.unlink()
    stage.counts["clock_jumps"] += 2


# -- brokers -------------------------------------------------------------------------------------


async def _chosen(stage: Stage, fault: Fault) -> int:
    await wait(stage.in_sync, 90, "every replica is in sync")
    role = str(fault.arguments["role"])
    node = await stage.node_of(role, _number(fault, "partition"))
    stage.counts[f"broker_faults_{role}"] += 1
    stage.counts["broker_faults"] += 1
    stage.watcher.forget_waiting()
    return node


async def _broker_kill(stage: Stage, fault: Fault) -> None:
    node = await _chosen(stage, fault)
    await asyncio.to_thread(stage.cluster.kill, node)
    await asyncio.sleep(_number(fault, "seconds"))
    await asyncio.to_thread(stage.cluster.restart, node)


async def _broker_freeze(stage: Stage, fault: Fault) -> None:
    node = await _chosen(stage, fault)
    await asyncio.to_thread(stage.cluster.freeze, node)
    try:
        await asyncio.sleep(3 + _number(fault, "seconds"))
    finally:
        stage.cluster.thaw(node)


async def _broker_restart(stage: Stage, fault: Fault) -> None:
    node = await _chosen(stage, fault)
    await asyncio.to_thread(stage.cluster.terminate, node)
    await asyncio.to_thread(stage.cluster.restart, node)


async def _disk_full(stage: Stage, fault: Fault) -> None:
    """No file of a node can grow: it must end rather than acknowledge what it cannot keep."""
    node = await _chosen(stage, fault)
    stage.limit_files(node, 4_096)
    await wait(lambda: not stage.cluster.running(node), 60, f"node {node} ends: its disk is full")
    await asyncio.to_thread(stage.cluster.kill, node)
    await asyncio.to_thread(stage.cluster.restart, node)
    stage.counts["disks_full"] += 1


# -- the network ---------------------------------------------------------------------------------


async def _latency(stage: Stage, fault: Fault) -> None:
    stage.network.latency_s = _number(fault, "ms") / 1000
    stage.counts["network_faults"] += 1
    await asyncio.sleep(_number(fault, "seconds"))
    stage.network.clear()


async def _reset(stage: Stage, fault: Fault) -> None:
    for _ in range(_number(fault, "times")):
        stage.network.reset()
        stage.counts["network_faults"] += 1
        await asyncio.sleep(0.05 + stage.dice.random() / 2)


async def _cut(stage: Stage, fault: Fault) -> None:
    direction = str(fault.arguments["direction"])
    for up in (True, False):
        if direction in ("both", "up" if up else "down"):
            stage.network.cut(up=up)
    stage.counts["network_faults"] += 1
    await asyncio.sleep(_number(fault, "seconds"))
    if fault.arguments["then"] == "reset":
        stage.network.reset()
    stage.network.clear()


async def _lost_answers(stage: Stage, fault: Fault) -> None:
    """Nodes do what they were asked, and nobody hears that they have."""
    of, times = str(fault.arguments["of"]), _number(fault, "times")
    before = stage.network.counts["answers_lost"]
    stage.network.lose = {_ANSWERS[of]: times}
    if of == "init":
        stage.kill(await stage.any_worker())
    stage.counts["network_faults"] += 1
    await wait(
        lambda: stage.network.counts["answers_lost"] > before,
        POINT_WITHIN_S,
        f"an answer {of} is lost",
    )
    await asyncio.sleep(2)
    stage.network.clear()


async def _late_commit(stage: Stage, fault: Fault) -> None:
    """Commits arrive late; with `reset` their clients lose the connection meanwhile and ask on
    another one, and the first request arrives in the middle of something else."""
    seconds = _number(fault, "ms") / 1000
    stage.network.hold = {network.END_TXN: (seconds, 3)}
    stage.network.hold_and_reset = bool(_number(fault, "reset"))
    stage.counts["network_faults"] += 1
    await wait(stage.network.held.is_set, POINT_WITHIN_S, "a commit is held")
    await asyncio.sleep(seconds + 1)
    stage.network.clear()


# -- pairs, and what needs the installation for itself -------------------------------------------


async def _zombie_and_late_commit(stage: Stage, _: Fault) -> None:
    """A worker freezes while its commit is on the way; the commit arrives when others own its
    partitions, and then the worker thaws."""
    await _two_run(stage)
    slot = await stage.any_worker()
    slot.held = True
    try:
        await wait(partial(_owns, slot), 60, f"{slot.name} has partitions")
        mark = slot.mark()
        held_s = 2.5 * SESSION_S
        stage.network.hold = {network.END_TXN: (held_s, 1_000)}
        await wait(stage.network.held.is_set, POINT_WITHIN_S, "a commit is held")
        await asyncio.sleep(0.5)
        slot.worker.signal(signal.SIGSTOP)
        since = monotonic()
        stage.network.clear()
        await _taken_over(stage, [slot], since)
        await asyncio.sleep(max(0, since + held_s + 1 - monotonic()))
        slot.worker.signal(signal.SIGCONT)
        stage.counts["zombies"] += 1
        stage.counts["network_faults"] += 1
        await _learns(stage, slot, mark, ())
    finally:
        stage.network.clear()
        if slot.running:
            slot.worker.signal(signal.SIGCONT)
        slot.held = False
    await _back_to_base(stage)


async def _payments_and_kill(stage: Stage, _: Fault) -> None:
    for _again in range(2):
        await wait(lambda: stage.payments.running, 30, "the payment service runs")
        stage.payments.kill()
        stage.counts["payment_services_killed"] += 1
        slot = await stage.any_worker()
        stage.kill(slot)
        await stage.served(slot)


async def _hijack(stage: Stage, fault: Fault) -> None:
    """Somebody starts a producer with a shard's transactional id, and again. Its owner must write
    nothing more. The first time in a day it opens again once nobody came for the partition,
    the second time it must say why and end; whoever is started then has the id again."""
    partition = _number(fault, "partition")
    gave_up = False
    for _again in range(2):
        marks = {slot.name: slot.mark() for slot in stage.slots}
        thief = transactional_producer(stage.settings, partition)
        await thief.start()
        await thief.stop()
        await wait(
            partial(_any_told, stage, marks, "fenced", partition),
            60,
            "the owner of the stolen id learns it",
        )
        await wait(
            partial(_any_told, stage, marks, "shard_open", partition),
            60,
            "the partition of the stolen id is open again",
        )
        gave_up = gave_up or _any_told(stage, marks, "gave_up")
    if not gave_up:
        stage.violations.append("the owner of an id that was stolen twice did not give up")
    stage.counts["hijacks"] += 1
    await stage.served(*stage.base)


def _any_told(
    stage: Stage, marks: dict[str, int], event: str, partition: int | None = None
) -> bool:
    return any(
        partition is None or line["partition"] == partition
        for slot in stage.slots
        for line in slot.told(marks[slot.name], event)
    )


async def _two_installations(stage: Stage, _: Fault) -> None:
    """A second installation with the same namespace: its workers own the same partitions in
    another group. Both fence each other; that is bad, but nothing may be booked twice."""
    slot = stage.spare
    slot.held = True
    try:
        mark = slot.mark()
        slot.start(CHAOS_GROUP="t-chaos-other")
        await wait(lambda: bool(slot.told(mark, "shard_open")), 60, "the second installation opens")
        await asyncio.sleep(12)
        slot.worker.kill()
        stage.counts["sigkills"] += 1
        stage.counts["second_installations"] += 1
        slot.start(CREDITS_PARTITIONS=str(2 * stage.settings.partitions))
        await wait(lambda: not slot.running, 60, "another number of partitions is refused")
        process = slot.worker.process
        if process is None or process.returncode != 2:
            stage.violations.append("a worker with another number of partitions was not refused")
    finally:
        slot.worker.kill()
        slot.held = False
    await stage.served(*stage.base)


async def _all_rest(stage: Stage) -> None:
    for slot in stage.slots:
        slot.wanted = False
    for slot in stage.slots:
        await stage.stop(slot)


async def _rewind(stage: Stage, _: Fault) -> None:
    """An operator sets the group back to the start of every topic."""
    await _all_rest(stage)
    tps = {
        TopicPartition(name, number): OffsetAndMetadata(0, "")
        for name in stage.settings.topics.sources
        for number in range(stage.settings.partitions)
    }
    consumer = AIOKafkaConsumer(
        bootstrap_servers=stage.settings.broker, group_id=stage.settings.app_id,
        enable_auto_commit=False,
    )  # fmt: skip
    await consumer.start()
    try:
        consumer.assign(list(tps))
        await consumer.commit(tps)
        for tp in tps:
            assert await consumer.committed(tp) == 0
    finally:
        await consumer.stop()
    stage.counts["rewinds"] += 1
    await _back_to_base(stage)


async def _forget_offsets(stage: Stage, _: Fault) -> None:
    """The group's committed offsets are deleted."""
    await _all_rest(stage)
    node = await stage.node_of("group", 0)
    await wait(
        lambda: _group_deleted(stage, node), 60, "the group is empty and its offsets are deleted"
    )
    stage.counts["offsets_forgotten"] += 1
    await _back_to_base(stage)


async def _group_deleted(stage: Stage, node: int) -> bool:
    """DeleteGroups v0, by hand: our client has no such request."""
    name = stage.settings.app_id.encode()
    body = b"\0\0\0\x01" + len(name).to_bytes(2, "big") + name
    request = b"\0\x2a\0\0\0\0\0\x07\xff\xff" + body
    port = int(stage.settings.broker.split(",")[node].rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(len(request).to_bytes(4, "big") + request)
        size = int.from_bytes(await reader.readexactly(4), "big")
        answer = await reader.readexactly(size)
    finally:
        writer.close()
        await writer.wait_closed()
    return int.from_bytes(answer[-2:], "big") == 0


async def _compaction(stage: Stage, _: Fault) -> None:
    """The changelog is compacted while workers write it and while they restore from it."""
    name = stage.settings.topics.of(topics.CHANGELOG)
    marks = list((stage.folder / "kafka").glob("node-*/data/cleaner-offset-checkpoint"))

    def cleaned() -> int:
        offsets = 0
        for path in marks:
            for line in path.read_text().splitlines():
                if line.startswith(name):
                    offsets += int(line.split()[-1])
        return offsets

    before = cleaned()
    await stage.configure(name, {"segment.ms": "500", "min.cleanable.dirty.ratio": "0.001"})
    for _again in range(2):
        slot = await stage.any_worker()
        stage.kill(slot)
        await stage.served(slot)
    await wait(lambda: cleaned() > before, 60, "the changelog is compacted")
    stage.counts["compactions_forced"] += 1
    await stage.configure(name, CHANGELOG)


FAULTS: Final[Mapping[str, Callable[[Stage, Fault], Awaitable[None]]]] = {
    "kill": _kill,
    "kill_at": _kill_at,
    "kill_in_restore": _kill_in_restore,
    "kill_in_rebalance": _kill_in_rebalance,
    "pause": _pause,
    "zombie": _zombie,
    "term": _term,
    "storm": _storm,
    "scale": _scale,
    "rolling": _rolling,
    "second_rebalance": _second_rebalance,
    "payments_kill": _payments_kill,
    "clock": _clock,
    "broker_kill": _broker_kill,
    "broker_freeze": _broker_freeze,
    "broker_restart": _broker_restart,
    "disk_full": _disk_full,
    "latency": _latency,
    "reset": _reset,
    "cut": _cut,
    "lost_answers": _lost_answers,
    "late_commit": _late_commit,
    "zombie_and_late_commit": _zombie_and_late_commit,
    "payments_and_kill": _payments_and_kill,
    "hijack": _hijack,
    "two_installations": _two_installations,
    "rewind": _rewind,
    "forget_offsets": _forget_offsets,
    "compaction": _compaction,
}
