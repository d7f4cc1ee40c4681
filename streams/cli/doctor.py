"""`credits doctor`: one line a check, each with its remedy."""

import asyncio
import platform
import struct
import sys
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Final

import msgspec
import typer

from schemas import topics
from streams.cli.output import EXIT_BROKER_AWAY, EXIT_FAILED, output_of, settings_now, wait_for
from streams.settings import Settings

_LIBRARIES: Final = ("faust-streaming", "aiokafka", "msgspec", "numpy", "xxhash")
# The highest metadata.version level a broker knows tells its release: the protocol does not say
# more. First level of each release.
_RELEASES: Final = ((1, "3.x"), (21, "3.9"), (22, "4.0"), (26, "4.1"), (28, "4.2"), (30, "4.3"))
_NEWER: Final = 31
# Loses the markers of an acknowledged commit while a partition has no leader (KAFKA-20734).
_LOSES_MARKERS: Final = ("4.3",)
_ANSWER_WITHIN_S: Final = 5
# A worker whose clock is further behind stops by itself.
_SKEW_S: Final = 300
# The head of a packed record of ids; its fourth member is the worker's clock in microseconds.
_SEEN: Final = "<BIqqI"
# Each record is followed by its transaction's marker; aborted ones may stand between.
_TAIL: Final = 20


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at and what was found; `ok` None: it could not be looked at."""

    check: str
    ok: bool | None
    found: str
    remedy: str = ""


def doctor(context: typer.Context) -> None:
    """Look at everything a worker needs; one line a check, each with its remedy."""
    settings = settings_now()
    output = output_of(context)
    checks = wait_for(_all(settings, output.as_json))
    if output.as_json:
        output.table([msgspec.to_builtins(check) for check in checks], "")
    away = any(check.check == "broker" and check.ok is False for check in checks)
    if any(check.ok is False for check in checks):
        raise SystemExit(EXIT_BROKER_AWAY if away else EXIT_FAILED)


async def _all(settings: Settings, quietly: bool) -> list[Check]:
    checks = []
    async for check in _checks(settings):
        checks.append(check)
        if not quietly:
            sys.stdout.write(_line(check) + "\n")
            sys.stdout.flush()
    return checks


def _line(check: Check) -> str:
    mark = {True: "✔", False: "✖", None: "–"}[check.ok]
    remedy = f"  → {check.remedy}" if check.remedy and not check.ok else ""
    return f"{mark} {check.check}: {check.found}{remedy}"


async def _checks(settings: Settings) -> AsyncIterator[Check]:
    from streams import VERSION, provision

    yield Check(check="credits", ok=True, found=VERSION)
    yield Check(
        check="python",
        ok=sys.version_info >= (3, 11),
        found=platform.python_version(),
        remedy="Install Python 3.11 or newer.",
    )
    yield _libraries()
    yield _schemas()
    try:
        differences = await provision.plan(settings)
    except provision.BrokerAwayError as error:
        yield Check(
            check="broker", ok=False, found=f"no answer at {settings.broker}", remedy=str(error)
        )
        yield await _worker(settings)
        return
    yield Check(check="broker", ok=True, found=f"{settings.broker} answers")
    yield await _release(settings)
    yield _topics(settings, differences)
    unreadable = [one for one in differences if one.what in ("missing", "partitions")]
    for name, look in (("transactions", _transactions), ("clock", _clock)):
        if unreadable:
            yield Check(
                check=name, ok=None, found="not looked at: the topics are not as they should be"
            )
        else:
            yield await look(settings)
    yield await _worker(settings)


def _libraries() -> Check:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return Check(
        check="libraries",
        ok=not missing,
        found=", ".join([*found, *(f"{name} is missing" for name in missing)]),
        remedy="pip install --require-hashes -r requirements/main.lock",
    )


def _schemas() -> Check:
    from schemas import generate

    different = generate.stale()
    return Check(
        check="schemas",
        ok=not different,
        found=f"{', '.join(different)}: not what the types say" if different else "as generated",
        remedy="Install the package again; in a checkout: python -m schemas.generate",
    )


def _topics(settings: Settings, differences: list[Any]) -> Check:
    if not differences:
        return Check(
            check="topics",
            ok=True,
            found=f"{len(topics.MANIFEST)} as they should be, {settings.partitions} partitions each",
        )
    first = differences[0]
    return Check(
        check="topics",
        ok=False,
        found=f"{len(differences)} differences, the first: {first.topic} {first.what}, wanted "
        f"{first.wanted}, found {first.found}",
        remedy=first.remedy or "credits topics plan, then credits topics apply",
    )


# -- the broker's release ----------------------------------------------------------------------


async def _release(settings: Settings) -> Check:
    try:
        async with asyncio.timeout(_ANSWER_WITHIN_S):
            level = await _metadata_level(settings)
    except (OSError, TimeoutError, EOFError, IndexError):
        level = None
    release = None if level is None else release_of(level)
    return Check(
        check="broker version",
        ok=None if release is None else release not in _LOSES_MARKERS,
        found="it does not say" if release is None else f"Kafka {release}",
        remedy="Kafka 4.3 can lose an acknowledged commit while a partition has no leader "
        "(KAFKA-20734). Use 4.2.1." if release is not None else "",
    )  # fmt: skip


def release_of(level: int) -> str:
    """The release that first knew this metadata.version level."""
    if level >= _NEWER:
        return "newer than 4.3"
    return [name for first, name in _RELEASES if first <= level][-1]


async def _metadata_level(settings: Settings) -> int | None:
    """The highest metadata.version a broker supports, from ApiVersions (version 3), by hand: no
    client library hands it out."""
    from streams.engine.kafka import connection

    host, _, port = settings.broker.partition(",")[0].strip().rpartition(":")
    context = connection(settings).get("ssl_context")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    try:
        name = b"\x08credits"
        request = b"\x00\x12\x00\x03\x00\x00\x00\x01\xff\xff\x00" + name + b"\x020\x00"
        writer.write(len(request).to_bytes(4, "big") + request)
        await writer.drain()
        size = int.from_bytes(await reader.readexactly(4), "big")
        return _highest(_Reply(await reader.readexactly(size)))
    finally:
        writer.close()


class _Reply:
    """Reads the fields of a flexible Kafka response."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._content[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big", signed=True)

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._content[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def skip_tags(self) -> None:
        for _ in range(self.varint()):
            self.varint()
            self.take(self.varint())


def _highest(reply: _Reply) -> int | None:
    reply.take(4)  # correlation id
    reply.take(2)  # error code
    for _ in range(reply.varint() - 1):
        reply.take(6)  # one API: key, lowest, highest
        reply.skip_tags()
    reply.take(4)  # throttle time
    for _ in range(reply.varint()):
        tag, content = reply.varint(), _Reply(reply.take(reply.varint()))
        if tag != 0:  # 0: the features that the software supports
            continue
        for _ in range(content.varint() - 1):
            name = content.take(content.varint() - 1)
            content.take(2)
            highest = content.number(2)
            content.skip_tags()
            if name == b"metadata.version":
                return highest
    return None


# -- what the topics tell ----------------------------------------------------------------------


async def _transactions(settings: Settings) -> Check:
    from aiokafka import TopicPartition

    from streams.engine.restore import Marks

    tps = [
        TopicPartition(settings.topics.of(topic.name), partition)
        for topic in topics.MANIFEST
        for partition in range(topic.partitions or settings.partitions)
    ]
    marks = Marks(settings)
    await marks.start()
    try:
        hanging = set(tps)
        # A running worker's transactions are short: one that hangs is there each time.
        for _ in range(3):
            stable = await marks.stable_ends(hanging)
            ends = await marks.ends(hanging)
            hanging = {tp for tp in hanging if stable[tp] < ends[tp]}
            if not hanging:
                break
            await asyncio.sleep(0.5)
    finally:
        await marks.stop()
    shown = ", ".join(f"{tp.topic}/{tp.partition}" for tp in sorted(hanging)[:3])
    return Check(
        check="transactions",
        ok=not hanging,
        found=f"open on {len(hanging)} partitions: {shown}" if hanging else "none hangs",
        remedy="Ask again in a minute; if it stays, kafka-transactions.sh find-hanging.",
    )


async def _clock(settings: Settings) -> Check:
    """Compare the worker's clock with the broker's: each packed record of ids holds the first,
    and is stamped by the second when it is appended."""
    latest = await _last_record(settings, settings.topics.of(topics.SEEN))
    if latest is None:
        return Check(check="clock", ok=None, found="not known before a worker has booked something")
    _, _, _, now_us, _ = struct.unpack_from(_SEEN, latest.value)
    skew_s = abs(latest.timestamp - now_us // 1000) // 1000
    return Check(
        check="clock",
        ok=skew_s < _SKEW_S,
        found=f"worker and broker agreed within {skew_s + 1} s at the last booking",
        remedy="Set both clocks by NTP: lateness, expiry and cooldowns follow the worker's.",
    )


async def _last_record(settings: Settings, topic: str) -> Any:
    """The latest committed record among the last offsets of all partitions, or None."""
    from aiokafka import TopicPartition

    from streams.testbed.kafka import ends_of, started_reader

    tps = [TopicPartition(topic, number) for number in range(settings.partitions)]
    reader = await started_reader(settings)
    latest = None
    try:
        starts, ends = await reader.beginning_offsets(tps), await ends_of(reader, tps)
        waiting = {tp for tp in tps if starts[tp] < ends[tp]}
        reader.assign(list(waiting))
        for tp in waiting:
            reader.seek(tp, max(starts[tp], ends[tp] - _TAIL))
        deadline = monotonic() + _ANSWER_WITHIN_S
        while waiting and monotonic() < deadline:
            for records in (await reader.getmany(*waiting, timeout_ms=200)).values():
                for record in records:
                    if latest is None or record.timestamp > latest.timestamp:
                        latest = record
            waiting = {tp for tp in waiting if await reader.position(tp) < ends[tp]}
    finally:
        await reader.stop()
    return latest


async def _worker(settings: Settings) -> Check:
    import aiohttp

    host = settings.metrics_host
    if host == "0.0.0.0":  # noqa: S104
        host = "127.0.0.1"
    url = f"http://{host}:{settings.metrics_port}/readyz"
    try:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_WITHIN_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            body = await answer.json()
        ready, reasons = bool(body["ok"]), "; ".join(body["reasons"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
        return Check(
            check="worker",
            ok=False,
            found=f"no worker answers at {url}",
            remedy="Start one with `credits worker`, or set CREDITS_METRICS_PORT to its port.",
        )
    return Check(
        check="worker",
        ok=ready,
        found=f"ready at {url}" if ready else f"not ready: {reasons}",
        remedy="Wait while it restores or rebalances; else see its log.",
    )


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(doctor)
