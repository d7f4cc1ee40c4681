"""The worker's view of published rate decks: the whole topic, read before anything is booked and
followed for as long as the worker runs.

Read without a group and committed only: every worker sees every version, in one order.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from schemas import topics
from schemas.decks import Assembly, Version
from streams.billing.charging import FORMER_KEPT
from streams.billing.rates import Decks, Tariff
from streams.billing.tariff import DeckError, parse_deck
from streams.engine.kafka import log_reader
from streams.settings import Settings

# A version begins ten minutes after it is published; half of that is time enough to see it.
OLD_AFTER_S: Final = 300.0
_POLL_MS: Final = 1_000
_AGAIN_AFTER_S: Final = 1.0

log = structlog.get_logger("credits.decks")


class DeckView:
    """Versions as far as the topic is read. `changed` is called with the decks whenever one came;
    until then nothing is published, and the file's deck is all there is."""

    def __init__(
        self,
        settings: Settings,
        file: Tariff,
        changed: Callable[[Decks], Any],
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._file = file
        self._changed = changed
        self._wall = wall
        self._tp = TopicPartition(settings.topics.of(topics.TARIFF), 0)
        self._assembly = Assembly()
        self._versions: list[Version] = []
        self._tariffs: dict[tuple[str, str], Tariff | None] = {}
        self._at_end = -OLD_AFTER_S
        self._follower: asyncio.Task[None] | None = None
        self._consumer: Any = None

    @property
    def age_s(self) -> float:
        """For how long the reader has not stood at the topic's end."""
        return monotonic() - self._at_end

    @property
    def is_old(self) -> bool:
        """Whether a version may be in force that is not read yet: nothing may be booked."""
        return self.age_s > OLD_AFTER_S

    async def start(self) -> None:
        """Read the topic to its end. Raises what aiokafka raises."""
        self._consumer = log_reader(self._settings)
        await self._consumer.start()
        self._consumer.assign([self._tp])
        await self._rewind()
        while self._at_end < 0:
            await self._read()
        self._follower = asyncio.ensure_future(self._follow())

    async def stop(self) -> None:
        """Disconnect."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        if self._consumer is not None:  # the broker may be gone before it was ever there
            await self._consumer.stop()

    async def _rewind(self) -> None:
        starts = await self._consumer.beginning_offsets([self._tp])
        self._consumer.seek(self._tp, starts[self._tp])

    async def _follow(self) -> None:
        anew = False
        while True:
            try:
                if anew:
                    await self._rewind()
                    anew = False
                await self._read()
            except OffsetOutOfRangeError:
                # Compaction never takes the end: the topic was made anew.
                log.warning("decks_read_again")
                anew = True
            except (KafkaError, TimeoutError, OSError) as error:
                log.warning("decks_not_read", error=type(error).__name__, age_s=round(self.age_s))
                await asyncio.sleep(_AGAIN_AFTER_S)
            except Exception:
                # A defect of ours: the view grows old, and the gate shuts.
                log.exception("decks_failed")
                raise

    async def _read(self) -> None:
        """Read on; note when the end is reached."""
        asked_at = monotonic()
        ends = await self._consumer.end_offsets([self._tp])
        end = ends[self._tp]
        if await self._consumer.position(self._tp) > end:
            raise OffsetOutOfRangeError({self._tp: end})
        while await self._consumer.position(self._tp) < end:
            fetched = await self._consumer.getmany(self._tp, timeout_ms=_POLL_MS)
            for record in fetched.get(self._tp, ()):
                version = self._assembly.add(record.key, record.value)
                if isinstance(version, str):
                    log.error("deck_ignored", reason=version)
                elif version is not None:
                    self._add(version)
        new = any(one.name not in self._tariffs for one in self._versions)
        if new:
            await self._parse()
            self._changed(self._decks())
        self._at_end = max(asked_at, 0.0)
        if not new:
            await asyncio.sleep(_POLL_MS / 1000 if self._follower is not None else 0)

    def _add(self, version: Version) -> None:
        """Keep a version, and let go what no call can start under any more."""
        self._versions = [one for one in self._versions if one.name != version.name]
        self._versions.append(version)
        self._tariffs.pop(version.name, None)
        oldest = self._wall() - FORMER_KEPT
        for place, one in enumerate(self._versions):
            since = one.manifest.effective_from
            if any(
                later.manifest.deck == one.manifest.deck
                and since <= later.manifest.effective_from <= oldest
                for later in self._versions[place + 1 :]
            ):
                self._let_go(place, None)

    def _let_go(self, place: int, tariff: Tariff | None) -> None:
        """A version's bytes are not needed any more."""
        version = self._versions[place]
        self._tariffs[version.name] = tariff
        self._versions[place] = Version(version.manifest, b"")

    async def _parse(self) -> None:
        for place, version in enumerate(self._versions):
            if version.name not in self._tariffs:
                self._let_go(place, await self._parsed(version))

    async def _parsed(self, version: Version) -> Tariff | None:
        manifest = version.manifest
        try:
            # Half a second for 100,000 rows, in which the loop must turn.
            tariff = await asyncio.to_thread(
                parse_deck,
                version.text.decode(),
                deck=manifest.deck,
                version=manifest.version,
                effective_from=manifest.effective_from,
            )
        except (DeckError, UnicodeDecodeError) as error:
            log.error("deck_unusable", deck=manifest.deck, version=manifest.version, why=str(error))
            return None
        log.info("deck_read", deck=manifest.deck, version=manifest.version, rows=len(tariff))
        return tariff

    def _decks(self) -> Decks:
        return Decks(
            self._file,
            [
                (one.manifest.deck, one.manifest.effective_from, self._tariffs[one.name])
                for one in self._versions
            ],
        )
