"""The compose file and the image: valid, careful, and its commands do run.

No container engine runs where these tests do, so the file is validated statically and the same
commands are started with the same environment as local processes.
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from streams.settings import Settings, from_environment
from streams.testbed.broker import free_port
from tests.broker.harness import until

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
OURS = ("topics", "worker", "payments", "load")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def run(*command: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_follows_the_specification() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_the_compose_file_passes_the_security_linter() -> None:
    run("compose-lint", "docker-compose.yml")


def test_the_image_file_passes_the_linter() -> None:
    run("hadolint", "deploy/Dockerfile")


@pytest.mark.parametrize("name", sorted(compose()["services"]))
def test_every_service_is_pinned_careful_and_bound_to_loopback(name: str) -> None:
    service = compose()["services"][name]
    tag = service["image"].rpartition(":")[2]
    assert tag[:1].isdigit() or tag[:1] == "v"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    test = service.get("healthcheck", {}).get("test")
    if test is not None and test[0] == "CMD-SHELL":
        assert len(test) == 2, "CMD-SHELL takes one string"


def test_the_broker_is_not_of_a_version_that_loses_markers() -> None:
    image = compose()["services"]["kafka"]["image"]
    assert image == "apache/kafka:4.2.1"


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_settings_that_this_version_knows(name: str) -> None:
    settings = from_environment(compose()["services"][name]["environment"])
    assert settings.namespace == "demo-"
    assert settings.plaintext


def test_prometheus_scrapes_the_port_that_workers_listen_on() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    [found] = scraped["scrape_configs"][0]["dns_sd_configs"]
    worker = compose()["services"]["worker"]["environment"]
    assert found["names"] == ["worker"]
    assert str(found["port"]) == worker["CREDITS_METRICS_PORT"]


class Service:
    """A service of the compose file as a local process."""

    def __init__(self, name: str, settings: Settings, port: int, folder: Path) -> None:
        service = compose()["services"][name]
        environment = {
            variable: text
            for variable, text in os.environ.items()
            if not variable.startswith("CREDITS_")
        }
        # Host names and ports are those of this machine; everything else is the file's.
        environment |= service["environment"] | {
            "CREDITS_BROKER": settings.broker,
            "CREDITS_NAMESPACE": settings.namespace,
            "CREDITS_METRICS_HOST": "127.0.0.1",
            "CREDITS_METRICS_PORT": str(port),
            "CREDITS_PARTITIONS": str(settings.partitions),
        }
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streams", *service["command"]],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ended(self) -> int:
        await until(lambda: self.process.poll() is not None, 60, self.log.read_text)
        return self.process.returncode


@pytest.mark.broker
async def test_the_commands_of_the_compose_file_run_and_stop_in_order(
    settings: Settings, tmp_path: Path
) -> None:
    import urllib.request

    port = free_port()
    topics = Service("topics", settings, port, tmp_path)
    assert await topics.ended() == 0, topics.log.read_text()
    running = [Service(name, settings, port, tmp_path) for name in ("worker", "payments")]

    def ready() -> bool:
        try:
            url = f"http://127.0.0.1:{port}/readyz"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        await until(ready, 60, running[0].log.read_text)
        # The simulator joins its group before it is stopped; joining is all it does here.
        await until(lambda: "answering" in running[1].log.read_text(), 30)
        await asyncio.sleep(0)
        for service in running:
            service.process.send_signal(signal.SIGTERM)
        for service in running:
            assert await service.ended() == 0, service.log.read_text()
    finally:
        for service in running:
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()
