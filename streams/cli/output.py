"""How commands speak: rows as a table on a terminal, as JSON lines when piped; prose on stderr."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn, TypeVar

import orjson
import typer

from streams.settings import Settings, from_environment

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_CONFLICT: Final = 4
EXIT_BROKER_AWAY: Final = 69
EXIT_UNKNOWN: Final = 75

T = TypeVar("T")


class Output:
    """Where a command's data and prose go."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Prose and progress, on stderr."""
        if not self.quiet:
            sys.stderr.write(text + "\n")

    def line(self, text: str) -> None:
        """A line of data that has a form of its own."""
        sys.stdout.write(text + "\n")

    def row(self, row: dict[str, Any]) -> None:
        """One result."""
        if self.as_json:
            self.line(orjson.dumps(row).decode())
            return
        width = max(len(name) for name in row)
        for name, value in row.items():
            self.line(f"{name.ljust(width)}  {_shown(value)}")

    def table(self, rows: Sequence[dict[str, Any]], empty: str) -> None:
        """Many results of one shape; `empty` is said when there are none."""
        if self.as_json:
            for row in rows:
                self.line(orjson.dumps(row).decode())
            return
        if not rows:
            self.say(empty)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, value in rows[0].items():
            number = isinstance(value, int) or name in (
                "balance",
                "amount",
                "available",
                "exposure",
            )
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            # Text, not markup: a value may hold square brackets.
            table.add_row(*(Text(_shown(value)) for value in row.values()))
        Console(file=sys.stdout, no_color=bool(os.environ.get("NO_COLOR"))).print(table)


def _shown(value: Any) -> str:
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.isoformat(timespec="seconds")
        case list() | tuple():
            return ", ".join(_shown(one) for one in value) or "-"
        case dict():
            return ", ".join(f"{name} {_shown(one)}" for name, one in value.items()) or "-"
        case _:
            return str(value)


def output_of(context: typer.Context) -> Output:
    """The output of this call."""
    found = context.find_object(Output)
    assert found is not None
    return found


def settings_now() -> Settings:
    """The settings from the environment. Raises SettingsError."""
    return from_environment(os.environ)


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    return asyncio.run(work)


def given(check: Callable[[str], str]) -> Callable[[str | None], str | None]:
    """A check of an option that may be absent."""
    return lambda text: None if text is None else check(text)


def fail(code: int, text: str) -> NoReturn:
    """End with one line that says what, why and what next."""
    sys.stderr.write(text + "\n")
    raise SystemExit(code)
