"""The command line: one file a group of commands. stdout is data, stderr is prose."""

import logging
import os
import sys
from typing import Annotated, Final

import typer

from streams import VERSION
from streams.cli import demo, inspect, operate, tenants
from streams.cli.output import EXIT_BROKER_AWAY, EXIT_USAGE, Output, fail, output_of
from streams.settings import SettingsError

app = typer.Typer(
    name="credits",
    help="Prepaid balances for telephony, booked exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED: Final = 130


@app.callback()
def _common(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines, also on a terminal.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    context.obj = Output(as_json=as_json or not sys.stdout.isatty(), quiet=quiet)


@app.command()
def version(context: typer.Context) -> None:
    """Print the version."""
    output_of(context).row({"version": VERSION})


tenants.register(app)
operate.register(app)
inspect.register(app)
demo.register(app)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    # A library's complaint beside our one line would only confuse.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    from streams.provision import BrokerAwayError, ProvisionError
    from streams.testbed.broker import BrokerError
    from streams.testbed.kafka import NamespaceRequiredError

    try:
        app()
    except SettingsError as error:
        fail(EXIT_USAGE, str(error))
    except BrokerAwayError as error:
        fail(EXIT_BROKER_AWAY, str(error))
    except (ProvisionError, NamespaceRequiredError, BrokerError) as error:
        fail(EXIT_USAGE, str(error))
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (head, less); that is no error of ours.
        os._exit(0)
