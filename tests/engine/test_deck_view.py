"""The worker's view of published decks, over a log that a test writes."""

from datetime import datetime, timedelta
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError, OffsetOutOfRangeError

from schemas.decks import DeckManifest, chunk_key, manifest_key, packed
from streams.billing.rates import Decks
from streams.engine import deck_view as module
from streams.engine.deck_view import OLD_AFTER_S, DeckView
from streams.settings import Settings
from tests.billing.builders import NOW, some_terms

HEADER = "Destination Name,Destination Type,Country,Prefix,Price / min\n"


class Log:
    """The deck topic, and a consumer that reads it."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes, bytes | None]] = []
        self.at = 0
        self.away = False
        self.breaks_at: int | None = None

    def publish(self, version: str, since: datetime, price: str = "1", **changes: Any) -> None:
        text = f"{HEADER}A,m,GB,4420,{price}\n".encode()
        chunks = packed(text)
        members: dict[str, Any] = {
            "deck": "default", "version": version, "effective_from": since, "published_at": NOW,
            "rows": 1, "chunks": len(chunks), "size": len(text),
            "sha256": sha256(text).hexdigest(),
        } | changes  # fmt: skip
        for number, chunk in enumerate(chunks):
            self.records.append((chunk_key("default", version, number), chunk))
        manifest = msgspec.json.encode(DeckManifest(**members))
        self.records.append((manifest_key("default", version), manifest))

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Disconnect."""

    def assign(self, tps: list[Any]) -> None:
        """Only one partition is there."""

    def seek(self, _: Any, offset: int) -> None:
        self.at = offset

    async def position(self, _: Any) -> int:
        if self.breaks_at is not None and self.at >= self.breaks_at:
            raise KafkaConnectionError("away")
        return self.at

    async def beginning_offsets(self, tps: list[Any]) -> dict[Any, int]:
        return {tps[0]: 0}

    async def end_offsets(self, tps: list[Any]) -> dict[Any, int]:
        if self.away:
            raise KafkaConnectionError("away")
        return {tps[0]: len(self.records)}

    async def getmany(self, tp: Any, timeout_ms: int) -> dict[Any, list[Any]]:
        found = self.records[self.at : self.at + 3]
        self.at += len(found)
        return {tp: [SimpleNamespace(key=key, value=value) for key, value in found]}


class Watched:
    """A view, its log, its clock and what it told."""

    def __init__(self) -> None:
        self.log = Log()
        self.told: list[Decks] = []
        self.monotonic = 1_000.0
        self.view = DeckView(Settings(), some_terms().tariff, self.told.append, wall=lambda: NOW)

    async def reads(self) -> None:
        await self.view._read()

    def version(self, ago: timedelta = timedelta(0)) -> str | None:
        tariff = self.told[-1].in_force("default", NOW - ago)
        return None if tariff is None else tariff.version


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched()
    monkeypatch.setattr(module, "log_reader", lambda _: made.log)
    monkeypatch.setattr(module, "monotonic", lambda: made.monotonic)
    return made


async def test_without_a_version_the_file_is_all_there_is(watched: Watched) -> None:
    assert watched.view.is_old
    await watched.view.start()
    await watched.view.stop()
    assert not watched.view.is_old
    assert watched.told == []


async def test_it_stands_at_the_end_before_it_says_so_and_follows(watched: Watched) -> None:
    for number in range(5):
        watched.log.publish(f"v{number}", NOW - timedelta(hours=9 - number))
    await watched.view.start()
    await watched.view.stop()
    assert watched.version() == "v4"
    watched.log.publish("next", NOW - timedelta(hours=1))
    await watched.reads()
    assert (watched.version(), watched.version(timedelta(hours=2))) == ("next", "v4")
    assert watched.version(timedelta(days=2)) == "file-test"


async def test_a_view_that_cannot_be_read_grows_old(watched: Watched) -> None:
    await watched.view.start()
    await watched.view.stop()
    watched.log.away = True
    watched.monotonic += OLD_AFTER_S
    with pytest.raises(KafkaConnectionError):
        await watched.reads()
    assert not watched.view.is_old
    watched.monotonic += 1
    assert watched.view.is_old
    watched.log.away = False
    await watched.reads()
    assert not watched.view.is_old


async def test_a_version_that_was_read_before_the_broker_went_away_is_used_when_it_is_back(
    watched: Watched,
) -> None:
    await watched.view.start()
    await watched.view.stop()
    watched.log.publish("next", NOW - timedelta(hours=1))
    watched.log.breaks_at = 2
    with pytest.raises(KafkaConnectionError):
        await watched.reads()
    watched.log.breaks_at = None
    await watched.reads()
    assert watched.version() == "next"


async def test_a_topic_that_was_made_anew_is_noticed(watched: Watched) -> None:
    watched.log.publish("first", NOW - timedelta(hours=2))
    await watched.view.start()
    await watched.view.stop()
    watched.log.records.clear()
    with pytest.raises(OffsetOutOfRangeError):
        await watched.reads()


async def test_a_version_that_is_not_whole_is_not_there(watched: Watched) -> None:
    watched.log.publish("good", NOW - timedelta(hours=2))
    watched.log.publish("broken", NOW - timedelta(hours=1), sha256="0" * 64)
    watched.log.records.append((b"nonsense", b"x"))
    await watched.view.start()
    await watched.view.stop()
    assert watched.version() == "good"


async def test_a_whole_version_that_cannot_be_used_prices_nothing(watched: Watched) -> None:
    watched.log.publish("good", NOW - timedelta(hours=2))
    watched.log.publish("unusable", NOW - timedelta(hours=1), price="dear")
    await watched.view.start()
    await watched.view.stop()
    assert (watched.version(), watched.version(timedelta(hours=1.5))) == (None, "good")


async def test_versions_that_no_call_can_start_under_are_let_go(watched: Watched) -> None:
    ages = {"ancient": 400, "old": 100, "last": 70, "newer": 60, "newest": 1}
    for version, days in ages.items():
        watched.log.publish(version, NOW - timedelta(days=days))
    await watched.view.start()
    await watched.view.stop()
    parsed = [version for version in ages if watched.view._tariffs["default", version]]
    assert parsed == ["last", "newer", "newest"]
    assert all(not version.whole for version in watched.view._versions), "bytes that were read"
    seen = {days: watched.version(timedelta(days=days)) for days in (0, 30, 65, 69, 90, 300)}
    assert seen == {0: "newest", 30: "newer", 65: "last", 69: "last", 90: None, 300: None}
