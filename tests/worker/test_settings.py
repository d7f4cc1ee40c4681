"""Settings: typed, once, and a typo never silently means the default."""

import io
import logging
from pathlib import Path

import pytest
import structlog

from streams import telemetry
from streams.settings import Settings, SettingsError, from_environment


def test_nothing_set_means_the_defaults() -> None:
    assert from_environment({"PATH": "/bin"}) == Settings()


def test_values_are_converted() -> None:
    read = from_environment(
        {"CREDITS_LINGER_MS": "5", "CREDITS_DECK": "/deck.csv", "CREDITS_NAMESPACE": "demo-"}
    )
    assert (read.linger_ms, read.deck, read.namespace) == (5, Path("/deck.csv"), "demo-")


def test_the_test_brokers_address_means_nothing_here() -> None:
    assert from_environment({"CREDITS_TEST_BROKER": "a:1"}) == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CREDITS_LINGR_MS", "5"),
        ("CREDITS_LINGER_MS", "soon"),
        ("CREDITS_LINGER_MS", "-1"),
        ("CREDITS_NAMESPACE", "Demo"),
        ("CREDITS_NAMESPACE", "demo"),
        ("CREDITS_BROKER_SECURITY", "none"),
        ("CREDITS_PARTITIONS", "0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=name):
        from_environment({name: text})


@pytest.mark.parametrize(
    ("broker", "security", "plaintext"),
    [
        ("127.0.0.1:9092", "auto", True),
        ("localhost:9092,127.0.0.2:9093", "auto", True),
        ("kafka:9092", "auto", False),
        ("127.0.0.1:9092,kafka:9092", "auto", False),
        ("kafka:9092", "plaintext", True),
        ("127.0.0.1:9092", "tls", False),
    ],
)
def test_tls_is_the_default_beyond_this_machine(
    broker: str, security: str, plaintext: bool
) -> None:
    assert Settings(broker=broker, broker_security=security).plaintext is plaintext


def test_no_phone_number_gets_through_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        telemetry.configure(Settings(log_format="json"))
        structlog.get_logger("credits.test").info("told", text="call to +442079460018 failed")
        logging.getLogger("library").error("cannot reach %s", "+442079460018")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert "442079460018" not in stream.getvalue()
    assert stream.getvalue().count("+…") == 2
