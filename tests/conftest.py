"""What all tests share: a real broker for each process of tests, a namespace for each
installation."""

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import hypothesis
import pytest

from streams import provision
from streams.settings import Settings
from streams.testbed import broker as testbed
from streams.testbed.broker import Cluster

PARTITIONS = 4
# The shortest that Kafka takes: after every SIGKILL the others wait for it.
SESSION_S = 6
# Properties are searched the same way every time: a failure here is a failure everywhere. A slow
# moment of the machine is none.
hypothesis.settings.register_profile(
    "house",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Kafka: one of ours, or what CREDITS_TEST_BROKER names."""
    named = testbed.external()
    if named is not None:
        yield named
        return
    with Cluster.start(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster.bootstrap


@pytest.fixture
async def settings(broker: str) -> AsyncIterator[Settings]:
    """Settings with a fresh namespace; its topics are removed afterwards."""
    made = Settings(
        broker=broker,
        namespace=f"t-{secrets.token_hex(4)}-",
        partitions=PARTITIONS,
        linger_ms=20,
        session_timeout_s=SESSION_S,
        result_timeout_s=3,
    )
    yield made
    await provision.remove_namespace(made)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The campaign and the benchmark first: each takes minutes, and must not be left for last."""
    long = ("tests/chaos/", "tests/testbed/")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note what a test ran on; the note travels with its report, from parallel workers too."""
    if not any(item.iter_markers("broker")) and not any(item.iter_markers("chaos")):
        ran_on = "no broker"
    elif "broker" in getattr(item, "fixturenames", ()) and testbed.external() is not None:
        ran_on = f"the cluster at {testbed.external()} ({testbed.EXTERNAL})"
    else:
        ran_on = f"Kafka {testbed.KAFKA_VERSION}, started for it on this machine"
    item.user_properties.append(("ran on", ran_on))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran on what: a green run without a broker must not look like one with."""
    ran = Counter(
        value
        for report in (
            *terminalreporter.getreports("passed"),
            *terminalreporter.getreports("failed"),
        )
        if report.when == "call"
        for name, value in report.user_properties
        if name == "ran on"
    )
    terminalreporter.section("what the tests ran on")
    for ran_on, count in sorted(ran.items()):
        terminalreporter.line(f"{count} tests on {ran_on}")
