"""Commands about this installation's own settings."""

import os
from pathlib import Path
from typing import Any

import msgspec
import typer

from schemas.usage import Kind
from streams.billing.coverage_table import CoverageError
from streams.billing.persons import PersonKeysError
from streams.cli.output import EXIT_USAGE, fail, output_of
from streams.coverage import load_coverage
from streams.persons import load_person_keys
from streams.settings import IGNORED, PREFIX, Settings, SettingsError, from_environment

config_app = typer.Typer(no_args_is_help=True, help="Settings of this installation.")


@config_app.command("show")
def show_config(context: typer.Context) -> None:
    """Every setting: its variable, its value now, its default, what it means; who pays for what.

    Works with wrong settings too, to see what is wrong: then it ends with 2.
    """
    output = output_of(context)
    faults = []
    values: dict[str, Any] = {}
    for name, text in sorted(os.environ.items()):
        if not name.startswith(PREFIX) or name in IGNORED:
            continue
        try:
            settings = from_environment({name: text})
        except SettingsError as error:
            faults.append(str(error))
        else:
            field = name.removeprefix(PREFIX).lower()
            values[field] = getattr(settings, field)
    rows = [
        {
            "variable": PREFIX + field.name.upper(),
            "value": _text(values.get(field.name, field.default)),
            "default": _text(field.default),
            "meaning": _meaning(field.type),
        }
        for field in msgspec.structs.fields(Settings)
    ]
    table: Path | None = values.get("coverage")
    try:
        paid = load_coverage(table)
    except CoverageError as error:
        faults += [f"{PREFIX}COVERAGE: {fault}" for fault in error.faults]
    else:
        default = paid if table is None else load_coverage(None)
        rows += [
            {
                "variable": f"{PREFIX}COVERAGE: {kind.value}",
                "value": ", ".join(paid.sources[kind]),
                "default": ", ".join(default.sources[kind]),
                "meaning": "who pays for this kind of usage, in order",
            }
            for kind in Kind
        ]
    try:
        load_person_keys(values.get("person_keys_file"))
    except PersonKeysError as error:
        faults.append(f"{PREFIX}PERSON_KEYS_FILE: {error}")
    output.table(rows, "")
    if faults:
        fail(EXIT_USAGE, "\n".join(faults))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _meaning(kind: Any) -> str:
    for extra in getattr(kind, "__metadata__", ()):
        if isinstance(extra, msgspec.Meta) and extra.description:
            return extra.description
    return ""


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(config_app, name="config")
