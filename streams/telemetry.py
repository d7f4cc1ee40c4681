"""Logs: one event name and fields a line, JSON when piped. No phone number ever gets through."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

from streams.settings import Settings

# The net under the rule: values of events are never logged, but a message of a library might.
_NUMBER: Final = re.compile(r"\+\d{6,15}\b")
# In the text of an exception also without the plus: the core knows numbers as digits.
_DIGITS: Final = re.compile(r"\b\d{8,15}\b")


def scrub(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask whatever looks like a phone number in any text of a log line."""
    for name, value in event.items():
        if isinstance(value, str):
            masked = _NUMBER.sub("+…", value)
            event[name] = _DIGITS.sub("…", masked) if name == "exception" else masked
    return event


def configure(settings: Settings) -> None:
    """Send our logs and those of the libraries to stderr in one form."""
    as_json = settings.log_format == "json" or (
        settings.log_format == "auto" and not sys.stderr.isatty()
    )
    renderer: Any = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer()
    )
    shared: list[Any] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        scrub,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("credits").setLevel(settings.log_level.upper())
    # Faust and aiokafka tell of every rebalance at warning level; errors are enough.
    for noisy in ("faust", "mode", "aiokafka"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
