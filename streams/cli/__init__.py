"""The command line: one file a group of commands. stdout is data, stderr is prose.

Kafka's clients and whatever else is slow to import is imported by the command that needs it.
"""

import logging
import os
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from streams import VERSION
from streams.cli import (
    balances,
    configuration,
    dead_letters,
    demo,
    doctor,
    explain,
    granting,
    operate,
    recharges,
    settings,
    statements,
    tariff,
    tenants,
    wire,
)
from streams.cli.output import (
    EXIT_BROKER_AWAY,
    EXIT_FAILED,
    EXIT_USAGE,
    Output,
    fail,
    output_of,
    settings_now,
)
from streams.settings import SettingsError

# Options of `credits` itself that people rightly expect to work behind a command too.
_ANYWHERE: Final = ("--json", "--quiet")


class _Credits(TyperGroup):
    """Takes common options anywhere, and tells an error in one line with its exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        front = [word for word in args[:end] if word in _ANYWHERE]
        rest = [word for word in args[:end] if word not in _ANYWHERE]
        # Only --json or only --quiet is as good as nothing: the help.
        return super().parse_args(ctx, (front if rest else []) + rest + args[end:])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output has left (head, less); that is no error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except Exception as error:
            told = _told(error)
            if told is None:
                raise
            fail(*told)


def _told(error: Exception) -> tuple[int, str] | None:
    """Exit code and text of an error that the user or the broker caused, None for a defect."""
    if isinstance(error, SettingsError):
        return EXIT_USAGE, str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return EXIT_FAILED, f"{error.filename}: {error.strerror}."
    from aiokafka.errors import KafkaError

    from streams.provision import BrokerAwayError, ProvisionError
    from streams.testbed.broker import BrokerError
    from streams.testbed.kafka import NamespaceRequiredError

    match error:
        case BrokerAwayError() | BrokerError():
            return EXIT_BROKER_AWAY, str(error)
        case ProvisionError() | NamespaceRequiredError():
            return EXIT_USAGE, str(error)
        case KafkaError():
            return EXIT_BROKER_AWAY, (
                f"The broker at {settings_now().broker} did not do it: {error}. See `credits "
                "doctor`, then try again."
            )
        case _:
            return None


app = typer.Typer(
    name="credits",
    cls=_Credits,
    help="Prepaid balances for telephony, booked exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's help costs more time than all the rest of starting.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _common(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines, also on a terminal. May stand anywhere.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr. May stand anywhere.")
    ] = False,
) -> None:
    context.obj = Output(as_json=as_json or not sys.stdout.isatty(), quiet=quiet)


@app.command()
def version(context: typer.Context) -> None:
    """Print the version, and whether the hot path runs as machine code."""
    from streams.billing import charging

    compiled = not charging.__file__.endswith(".py")
    output_of(context).row({"version": VERSION, "compiled": compiled})


for _group in (
    demo,
    operate,
    tenants,
    balances,
    granting,
    recharges,
    explain,
    statements,
    settings,
    tariff,
    dead_letters,
    doctor,
    configuration,
    wire,
):
    _group.register(app)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    # Stays in a file that is not compiled: only the interpreter is told of -O.
    if not __debug__:
        fail(
            EXIT_USAGE,
            "Python was told to leave out assertions, which keep the books: start it without -O "
            "and PYTHONOPTIMIZE.",
        )
    # A library's complaint beside our one line would only confuse.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    app()
