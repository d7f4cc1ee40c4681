"""The worker: the only place where things are wired together."""

import asyncio
import gc
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

import faust
import structlog
import uvloop
from aiokafka.errors import KafkaConnectionError, KafkaError
from faust.serializers.schemas import Schema
from prometheus_client import CollectorRegistry
from yarl import URL

from schemas import topics
from streams import telemetry
from streams.agents.ledger import ledger_agent
from streams.billing.coverage_table import CoverageError
from streams.billing.outcomes import Terms
from streams.billing.persons import PersonKeysError
from streams.billing.tariff import DeckError
from streams.coverage import load_coverage
from streams.decks import load_deck
from streams.engine.kafka import connection, hand_out_plain_records, tune_client
from streams.engine.shards import Loss, Shards, loss_from
from streams.engine.transport import TableManager, Transport, is_member
from streams.health import Health, Listener, ListenError
from streams.metrics import Meters
from streams.persons import load_person_keys
from streams.provision import BrokerAwayError, ProvisionError, require
from streams.settings import Settings

REBALANCE_BEYOND_SESSION_S: Final = 10
EXIT_OK: Final = 0
EXIT_USAGE: Final = 2
EXIT_BROKER_AWAY: Final = 69
EXIT_GAVE_UP: Final = 70

log = structlog.get_logger("credits.worker")


class _PassThrough(Schema):  # type: ignore[type-arg]
    """A message's value is a slice, already what it shall be."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        return message.key

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        return message.value


class CreditsApp(faust.App):
    """Faust's app: group, assignment, agent, table; the shards do the booking."""

    def __init__(self, settings: Settings, shards: Shards, listener: Listener) -> None:
        self.shards = shards
        self._listener = listener
        super().__init__(
            settings.app_id,
            broker=[URL(f"kafka://{host.strip()}") for host in settings.broker.split(",")],
            **({} if settings.plaintext else {"ssl_context": connection(settings)["ssl_context"]}),
            store="memory://",
            TableManager=TableManager,
            table_standby_replicas=0,
            topic_allow_declare=False,
            topic_disable_leader=True,
            topic_partitions=settings.partitions,
            stream_wait_empty=False,
            stream_buffer_maxsize=4096,
            broker_session_timeout=float(settings.session_timeout_s),
            broker_request_timeout=float(max(30, settings.session_timeout_s)),
            # Members that died with their broker are waited for so long, and nobody is served:
            # longer than a batch takes to settle is enough.
            broker_rebalance_timeout=float(settings.session_timeout_s + REBALANCE_BEYOND_SESSION_S),
            broker_heartbeat_interval=min(3.0, settings.session_timeout_s / 3),
            web_enabled=False,
            producer_acks=-1,
        )

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        """All state is in Kafka; no folder is needed."""

    async def on_start(self) -> None:
        """Answer probes and connect before Faust joins the group."""
        port = await self._listener.start()
        log.info("listening", metrics_port=port)
        await self.shards.start()
        await super().on_start()

    async def on_stop(self) -> None:
        """The shards first, while their partitions are still ours."""
        await self.shards.stop()
        await super().on_stop()
        await self._listener.stop()

    async def _on_partitions_revoked(self, revoked: Any) -> None:
        await self.shards.revoked()
        await super()._on_partitions_revoked(revoked)


def create_app(settings: Settings, losses: Sequence[Loss] = ()) -> CreditsApp:
    """Wire a worker. Raises DeckError, CoverageError or PersonKeysError when a file cannot be
    used."""
    tune_client()
    hand_out_plain_records()
    meters = Meters(CollectorRegistry())
    terms = Terms(
        tariff=load_deck(settings.deck),
        result_timeout_s=settings.result_timeout_s,
        coverage=load_coverage(settings.coverage),
        persons=load_person_keys(settings.person_keys_file),
    )
    shards = Shards(settings, meters=meters, terms=terms, losses=losses)

    def probe() -> Health:
        reasons = shards.reasons_not_ready()
        return Health(live=True, ready=not reasons, reasons=tuple(reasons))

    listener = Listener(settings.metrics_host, settings.metrics_port, meters, probe)
    app = CreditsApp(settings, shards, listener)
    shards.watch_group(lambda: is_member(app))
    sources = app.topic(*settings.topics.sources, schema=_PassThrough(), acks=False)
    app.agent(sources, name="ledger", use_reply_headers=False)(ledger_agent(shards))
    app.Table("accounts", partitions=settings.partitions, key_type=bytes, value_type=bytes)
    return app


async def preflight(settings: Settings) -> tuple[int, str] | None:
    """What would keep a worker from working: an exit code and one line, or None."""
    try:
        await require(settings, [settings.topics.of(topic.name) for topic in topics.MANIFEST])
    except ProvisionError as error:
        return EXIT_USAGE, str(error)
    except (BrokerAwayError, KafkaError, OSError):
        return EXIT_BROKER_AWAY, str(BrokerAwayError(settings.broker))
    return None


def run_worker(settings: Settings, *, accept_source_loss: Sequence[str] = ()) -> int:
    """Run a worker until it is told to stop (SIGTERM, SIGINT); return the exit code.

    0 stopped in order, 2 a setting or topic is wrong, 69 no broker, 70 gave up.
    """
    # Until it is known that there is a broker, one line of ours says what is wrong.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        losses = [loss_from(text) for text in accept_source_loss]
    except ValueError as error:
        return _refuse(EXIT_USAGE, f"--accept-source-loss: {error}")
    problem = asyncio.run(preflight(settings))
    if problem is not None:
        return _refuse(*problem)
    telemetry.configure(settings)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        app = create_app(settings, losses)
    except (DeckError, OSError) as error:
        return _refuse(EXIT_USAGE, f"CREDITS_DECK: {error}")
    except CoverageError as error:
        return _refuse(EXIT_USAGE, f"CREDITS_COVERAGE: {error}")
    except PersonKeysError as error:
        return _refuse(EXIT_USAGE, f"CREDITS_PERSON_KEYS_FILE: {error}")
    _calm_collector()
    worker = faust.Worker(
        app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False
    )
    worker.spinner = None
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        if end.code == EXIT_OK:
            return EXIT_OK
        # Faust ends by itself when something of it cannot start or has died, and says it at length.
        cause = end.__context__
        if isinstance(cause, ListenError):
            return _refuse(EXIT_USAGE, str(cause))
        if isinstance(cause, KafkaConnectionError):
            return _refuse(EXIT_BROKER_AWAY, str(BrokerAwayError(settings.broker)))
        why = f"code {end.code}" if cause is None else f"{type(cause).__name__}: {cause}"
        log.error("gave_up", reason=f"Faust has ended: {why}")
        return EXIT_GAVE_UP
    except Exception as error:
        log.exception("worker_failed", error=type(error).__name__)
        return EXIT_GAVE_UP
    return EXIT_OK


def _calm_collector() -> None:
    """Let the garbage collector look less often, and never again at what is loaded by now: a
    batch makes hundreds of thousands of objects that die with it, and no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(500_000, 10, 10)


def _refuse(code: int, text: str) -> int:
    sys.stderr.write(text + "\n")
    return code
