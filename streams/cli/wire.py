"""Commands about the JSON Schemas that other programs read."""

from pathlib import Path
from typing import Annotated

import typer

from streams.cli.output import EXIT_FAILED, output_of

schemas_app = typer.Typer(no_args_is_help=True, help="JSON Schemas of every record.")


@schemas_app.command("export")
def export_schemas(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to write them.")],
) -> None:
    """Write the JSON Schemas of this version, for programs in other languages."""
    from schemas import generate

    rows = [{"file": str(path)} for path in generate.write(folder)]
    output_of(context).table(rows, "")


@schemas_app.command("check")
def check_schemas(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="A copy to compare; default: the packaged ones.")
    ] = None,
) -> None:
    """Compare schemas with what this version reads and writes; ends with 1 when they differ."""
    from schemas import generate

    stale = generate.stale() if folder is None else generate.stale(folder)
    output = output_of(context)
    output.table(
        [{"file": name, "what": "differs"} for name in stale], "All are as they should be."
    )
    if stale:
        output.say("Write them again with `credits schemas export FOLDER`.")
        raise SystemExit(EXIT_FAILED)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(schemas_app, name="schemas")
