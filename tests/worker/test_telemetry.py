"""No phone number gets into a log, whatever carries it."""

import io
import logging

import pytest
import structlog

from streams import telemetry
from streams.settings import Settings


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_number_in_an_exception_is_masked_also_without_its_plus(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, said = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level, structlog.get_config()
    monkeypatch.setattr("sys.stderr", said)
    try:
        telemetry.configure(Settings(log_format=form))
        error = KeyError("442079460018")
        error.__cause__ = ValueError("a call to +442079460019")
        structlog.get_logger("credits.test").error("defect", place="topic/123456", exc_info=error)
    finally:
        root.handlers[:], level, config = before
        root.setLevel(level)
        structlog.configure(**config)
    assert "defect" in said.getvalue()
    assert "topic/123456" in said.getvalue()
    assert "KeyError" in said.getvalue()
    assert "ValueError" in said.getvalue()
    for digits in ("442079460018", "442079460019"):
        assert digits not in said.getvalue()
