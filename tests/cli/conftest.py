"""An installation with a running worker for the commands that need one, and ways to call them."""

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from streams import provision
from streams.cli import app
from streams.cli.demo import environment_of
from streams.settings import PREFIX, Settings
from tests.broker.harness import Worker

ROOT = Path(__file__).parents[2]


class Answer(msgspec.Struct, frozen=True):
    """What a command said and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout."""
        return [msgspec.json.decode(line) for line in self.stdout.splitlines()]

    @property
    def row(self) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows
        return row


def plain_environment(settings: Settings | None = None, **more: str) -> dict[str, str]:
    """The environment of a program, without this shell's own settings."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(PREFIX)}
    return {**inherited, **({} if settings is None else environment_of(settings)), **more}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Call a command in this process, for what needs no broker."""
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)

    def call(*arguments: str, **environment: str) -> Answer:
        result = CliRunner().invoke(app, list(arguments), env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


def credits_of(settings: Settings) -> Callable[..., Answer]:
    """Call commands as an operator of this installation does; no traceback is ever right."""

    def call(*arguments: str) -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "streams", *arguments],
            env=plain_environment(settings),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    return call


def _an_installation(broker: str) -> Settings:
    return Settings(
        broker=broker, namespace=f"t-{secrets.token_hex(4)}-", partitions=4, linger_ms=20
    )


@pytest.fixture(scope="module")
def office(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """An installation whose worker runs."""
    settings = _an_installation(broker)
    asyncio.run(provision.apply(settings))
    worker = Worker(settings, tmp_path_factory.mktemp("worker"))
    try:
        worker.start()
        asyncio.run(worker.ready())
        yield worker.settings
    finally:
        worker.kill()
        asyncio.run(provision.remove_namespace(settings))


@pytest.fixture(scope="module")
def unattended(broker: str) -> Iterator[Settings]:
    """An installation without any worker."""
    settings = _an_installation(broker)
    asyncio.run(provision.apply(settings))
    yield settings
    asyncio.run(provision.remove_namespace(settings))
