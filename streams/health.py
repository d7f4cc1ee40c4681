"""The worker's own listener: metrics and probes, answering while tables are restored."""

import asyncio
import errno
from collections.abc import Callable
from time import monotonic
from typing import Final

import orjson
from aiohttp import web
from msgspec import Struct
from prometheus_client.exposition import choose_encoder

from streams.metrics import Meters

# Several scrapers, or an impatient operator, must not render the same page again and again.
CACHED_S: Final = 1.0


class Health(Struct, frozen=True):
    """How the worker is. `live` false asks for a restart, `ready` false for patience."""

    live: bool
    ready: bool
    reasons: tuple[str, ...] = ()


class ListenError(Exception):
    """The address for metrics and probes cannot be had; the text says what to set."""


class Listener:
    """Serves /metrics, /livez, /readyz, and /healthz for those who type it."""

    def __init__(self, host: str, port: int, meters: Meters, probe: Callable[[], Health]) -> None:
        self._host = host
        self._port = port
        self._meters = meters
        self._probe = probe
        self._runner: web.AppRunner | None = None
        self._page: dict[str, tuple[float, bytes, str]] = {}

    async def start(self) -> int:
        """Listen; returns the port. Raises ListenError, when it is taken for instance."""
        app = web.Application(client_max_size=1024)
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/livez", self._livez),
                web.get("/healthz", self._livez),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ListenError(
                f"Cannot listen on {self._host}:{self._port} for metrics and probes: "
                f"{error.strerror or error}. "
                + (
                    "Another worker may have it; name a free CREDITS_METRICS_PORT."
                    if taken
                    else "Set CREDITS_METRICS_HOST and CREDITS_METRICS_PORT to an address of this "
                    "machine."
                )
            ) from error
        port: int = self._runner.addresses[0][1]
        return port

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        cached = self._page.get(accept)
        if cached is None or monotonic() - cached[0] > CACHED_S:
            encode, content_type = choose_encoder(accept)
            # Rendering takes the loop's time; a thread shares it.
            body = await asyncio.to_thread(encode, self._meters.registry)
            self._page.clear()
            cached = self._page[accept] = (monotonic(), body, content_type)
        return web.Response(body=cached[1], headers={"Content-Type": cached[2]})

    async def _livez(self, _: web.Request) -> web.Response:
        health = self._probe()
        return _answer(health.live, () if health.live else health.reasons)

    async def _readyz(self, _: web.Request) -> web.Response:
        health = self._probe()
        return _answer(health.ready, health.reasons)


def _answer(good: bool, reasons: tuple[str, ...]) -> web.Response:
    return web.Response(
        body=orjson.dumps({"ok": good, "reasons": list(reasons)}),
        status=200 if good else 503,
        content_type="application/json",
    )
