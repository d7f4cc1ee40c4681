"""How the command line behaves whatever the command: help, errors, exit codes, forms of output."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main

from schemas.usage import Kind
from streams import VERSION
from streams.cli import app
from streams.cli.output import Output
from streams.cli.tenants import with_pools_as_lines
from streams.coverage import coverage_bytes
from streams.settings import PREFIX, Settings
from streams.testbed import load as generator
from streams.testbed.broker import free_port
from tests.cli.conftest import ROOT, Answer, plain_environment

Call = Callable[..., Answer]
SLOW = {"aiokafka", "faust", "aiohttp", "rich", "prometheus_client", "uvloop", "numpy"}


def every_command() -> Iterator[tuple[str, ...]]:
    def below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, one in getattr(command, "commands", {}).items():
            yield from below(one, (*path, name))

    return below(typer.main.get_command(app), ())


def test_help_loads_nothing_that_is_slow_to_load() -> None:
    code = "import sys\nfrom streams.cli import app\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert SLOW.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "environment"),
    [(["-O"], {}), (["-OO"], {}), ([], {"PYTHONOPTIMIZE": "1"})],
    ids=["-O", "-OO", "PYTHONOPTIMIZE"],
)
@pytest.mark.parametrize("arguments", [["version"], ["worker"]], ids=" ".join)
def test_nothing_runs_without_assertions(
    options: list[str], environment: dict[str, str], arguments: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-m", "streams", *arguments],
        cwd=ROOT,
        env=plain_environment() | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Python was told to leave out assertions, which keep the books: start it without -O and "
        "PYTHONOPTIMIZE.\n"
    )


def test_a_load_has_a_name_of_its_own_unless_one_is_given(
    said: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[generator.Plan] = []

    async def nothing(*_: object) -> None:
        """Takes the place of the broker."""

    async def produce(_: object, plan: generator.Plan, **__: object) -> generator.Produced:
        plans.append(plan)
        return generator.Produced()

    monkeypatch.setattr("streams.provision.require", nothing)
    monkeypatch.setattr(generator, "produce", produce)
    for more in ([], ["--run", "again"]):
        answer = said(
            *("load", "--no-open", "--events", "1", "--expect", str(tmp_path / "e.json"), *more),
            CREDITS_NAMESPACE="t-x-",
        )
        assert answer.code == 0
        assert answer.row["run"] == plans[-1].run
    assert re.fullmatch(r"\d{8}T\d{6}\d{3}Z", plans[0].run)
    assert plans[1].run == "again"


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_says_what_it_is_for(said: Call, path: tuple[str, ...]) -> None:
    answer = said(*path, "--help")
    assert answer.code == 0
    usage, _, rest = answer.stdout.partition("\n\n")
    assert usage.startswith("Usage: ")
    assert rest.strip()
    assert not rest.strip().startswith("Options:")


def test_the_version_is_data_on_stdout(said: Call) -> None:
    # The tests run from the sources, whatever else is built.
    assert said("version").row == {"version": VERSION, "compiled": False}


def test_common_options_may_stand_behind_the_command(said: Call) -> None:
    assert said("version", "--json", "--quiet") == said("--json", "--quiet", "version")


def test_words_behind_two_dashes_are_no_options(said: Call) -> None:
    assert said("vectors", "--", "--json").stderr.startswith("--json cannot be read")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["frobnicate"], "No such command"),
        (["balence", "t-1"], "Did you mean 'balance'"),
        (["balance"], "Missing argument"),
        (["balance", "two words"], "is no tenant id"),
        (["balances", "--below", "1e5"], "is no amount. Enter one such as 20 or 20.00."),
        (["balances", "--sort", "colour"], "choose balance or tenant_id"),
        (["topup", "t-1", "50", "dollars"], "is no currency. Enter three letters such as USD."),
        (["topup", "t-1", "50", "--reason", "x"], "goes with --already-paid"),
        (["adjust", "t-1", "-2.00"], "needs a --reason"),
        (["grant", "t-1", "5"], "needs a --reason"),
        (["grant", "t-1", "5", "--kind", "gift", "--reason", "x"], "choose paid or promotional"),
        (["grant", "t-1", "5", "--effective-at", "soon", "--reason", "x"], "effective_at: Invalid"),
        (["void", "t-1", "g1"], "needs a --reason"),
        (["settings", "set", "t-1", "--alert-level", "all"], "write a percentage from 1 to 99"),
        (["recharge", "resolve", "t-1", "r"], "Say --paid or --not-paid"),
        (["recharge", "resolve", "t-1", "r", "--paid"], "--paid needs --payment-id and --amount"),
        (
            ["recharge", "resolve", "t-1", "r", "--not-paid", "--amount", "5"],
            "--not-paid takes neither",
        ),
        (["explain", "t-1", "--entry", "1", "--recharge", "r"], "exclude each other"),
        (["statement", "show", "t-1", "--since", "soon"], "is no day or instant"),
        (["statement", "verify", "a", "--head", "b", "--earlier", "c"], "exclude each other"),
        (["settings", "set", "t-1", "--velocity", "premium"], "write CLASS=AMOUNT"),
        (["adjust", "t-1", "-2.00", "--raeson", "x"], "'--raeson' is no currency"),
        (["tenant", "open", "t-1", "--billing-from", "soon"], "billing_from: Invalid RFC3339"),
        (["tenant", "open", "t-1", "--id", "i" * 256], "an id has 1 to 255 characters"),
        (["tenant", "close", "t-1"], "Say --yes if that is meant"),
        (["settings", "set", "t-1"], "Nothing to change"),
        (["settings", "set", "t-1", "--method", "all"], "choose one of fixed, fixed_multiple"),
        (["dlq", "list", "--reason", "bad"], "is no reason: malformed_json"),
        (["dlq", "list", "--topic", "mine"], "is no source topic: credits.command.v1"),
        (["dlq", "show", "telephony.call.usage.v1/1"], "is no TOPIC/PARTITION/OFFSET"),
        (["demo", "--for", "soon"], "Write one such as 20s, 5m or 1h"),
        (["demo", "--for", "0s"], "at least 1s"),
        (["load", "--late", "101"], "more than 100 per cent"),
        (["load", "--run", "a b"], "--run is a name of at most 64"),
        (["load"], "Set CREDITS_NAMESPACE (demo- or another), or say --yes-this-is-not"),
        (["payments", "run"], "Set CREDITS_NAMESPACE (demo- or another), or say --yes-this-is-not"),
        (["verify", "--expect", "nowhere.json"], "nowhere.json is no file"),
        (["verify", "--tenant", "t-1", "--checkpoint", "c"], "A checkpoint is of everything"),
        (["verify", "--partition", "1", "--checkpoint", "c"], "leave --tenant and --partition out"),
        (["vectors", "nowhere.json"], "nowhere.json cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_with_2_and_says_what_is_right(
    said: Call, arguments: list[str], told: str
) -> None:
    namespace = {} if "Set CREDITS_NAMESPACE" in told else {"CREDITS_NAMESPACE": "t-x-"}
    answer = said(*arguments, **namespace)
    assert answer.code == 2
    assert told in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["balance", "t-1"],
        ["balances"],
        ["tenant", "show", "t-1"],
        ["tenant", "open", "t-1"],
        ["topup", "t-1", "50"],
        ["recharge", "approve", "t-1"],
        ["explain", "t-1"],
        ["statement", "show", "t-1"],
        ["adjust", "t-1", "-1", "--reason", "x"],
        ["grant", "t-1", "5", "--reason", "x"],
        ["void", "t-1", "g1", "--reason", "x"],
        ["grants", "t-1"],
        ["settings", "show", "t-1"],
        ["settings", "set", "t-1", "--disable"],
        ["topics", "plan"],
        ["topics", "apply"],
        ["topics", "check"],
        ["dlq", "list"],
        ["dlq", "replay", "--yes"],
        ["load", "--events", "1"],
        ["payments", "run"],
        ["worker"],
    ],
    ids=" ".join,
)
def test_a_missing_broker_ends_with_69_in_one_line(arguments: list[str]) -> None:
    broker = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-m", "streams", *arguments, "--quiet"],
        cwd=ROOT,
        env=plain_environment(CREDITS_BROKER=broker, CREDITS_NAMESPACE="t-x-"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"No broker at {broker}. Start one with `credits demo`, or set CREDITS_BROKER."
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("started", "code", "word"),
    [
        ("app.preflight = later", 69, "No broker at 127.0.0.1:1."),
        ("app.Listener.start = broken", 70, "gave_up"),
        ("app.Shards.start = broken", 70, "gave_up"),
        ("taken = socket.create_server(('127.0.0.1', 0))", 2, "CREDITS_METRICS_PORT"),
    ],
)
def test_a_worker_that_cannot_start_says_why(started: str, code: int, word: str) -> None:
    # The broker goes after it was there, or something of Faust's side breaks.
    program = (
        "import socket, sys; from streams import app; from streams.settings import Settings\n"
        "async def later(settings): return None\n"
        "async def broken(_): raise RuntimeError('not today')\n"
        f"app.preflight = later; {started}\n"
        "port = taken.getsockname()[1] if 'taken' in globals() else 0\n"
        "sys.exit(app.run_worker(Settings(broker='127.0.0.1:1', metrics_port=port)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=plain_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert word in done.stderr.splitlines()[-1]
    assert code != 70 or "RuntimeError: not today" in done.stderr.splitlines()[-1]
    assert "AttributeError" not in done.stderr, "what never started is not stopped"


def test_the_doctor_finds_a_missing_broker_and_looks_at_the_rest(said: Call) -> None:
    answer = said(
        "doctor",
        CREDITS_BROKER=f"127.0.0.1:{free_port()}",
        CREDITS_METRICS_PORT=str(free_port()),
    )
    assert answer.code == 69
    found = {row["check"]: row for row in answer.rows}
    assert found["python"]["ok"]
    assert found["libraries"]["ok"]
    assert not found["broker"]["ok"]
    assert "CREDITS_BROKER" in found["broker"]["remedy"]
    assert not found["worker"]["ok"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("CREDITS_BROKR", "x"), ("CREDITS_PARTITIONS", "0"), ("CREDITS_BROKER", "here:there")],
)
def test_a_wrong_setting_ends_with_2_in_one_line(said: Call, name: str, text: str) -> None:
    answer = said("balances", **{name: text})
    assert answer.code == 2
    assert answer.stderr.startswith(name)
    assert answer.stderr.count("\n") == 1


def test_config_show_lists_every_setting_with_its_meaning(said: Call) -> None:
    answer = said("config", "show", CREDITS_PARTITIONS="6")
    assert answer.code == 0
    found = {row["variable"]: row for row in answer.rows}
    settings = {PREFIX + field.name.upper() for field in msgspec.structs.fields(Settings)}
    assert found.keys() == settings | {f"CREDITS_COVERAGE: {kind.value}" for kind in Kind}
    assert found["CREDITS_COVERAGE: conf_dial_out"]["value"] == "conference, credits"
    assert (found["CREDITS_PARTITIONS"]["value"], found["CREDITS_PARTITIONS"]["default"]) == (
        "6",
        "12",
    )
    assert [name for name, row in found.items() if not row["meaning"]] == []


def test_config_show_shows_the_coverage_table_in_force_or_what_is_wrong_with_it(
    said: Call, tmp_path: Path
) -> None:
    table = tmp_path / "coverage.toml"
    packaged = coverage_bytes(None).decode()
    wrong = packaged.replace('payg_out = ["c', 'payg_out = ["fr", "c')
    table.write_text(wrong.replace('dial_out = ["conf', 'dial_out = ["who", "conf'))
    answer = said("config", "show", CREDITS_COVERAGE=str(table))
    assert answer.code == 2
    for fault in ("payg_out: 'fr'", "conf_dial_out: 'who'"):
        assert f"CREDITS_COVERAGE: sources.{fault} is no source; known are" in answer.stderr
    table.write_text(packaged.replace('in = ["free"]', 'in = ["credits"]'))
    rows = {
        row["variable"]: row for row in said("config", "show", CREDITS_COVERAGE=str(table)).rows
    }
    row = rows["CREDITS_COVERAGE: conf_dial_in"]
    assert (row["value"], row["default"]) == ("credits", "free")
    assert said("config", "show", CREDITS_COVERAGE=str(tmp_path / "no")).code == 2
    keys = tmp_path / "keys.json"
    keys.write_text('{"t-1": "secret"}')
    answer = said("config", "show", CREDITS_PERSON_KEYS_FILE=str(keys))
    assert (answer.code, "secret" in answer.stderr) == (2, False)
    assert "CREDITS_PERSON_KEYS_FILE: the key of 't-1' is not 64 hex" in answer.stderr


def test_config_show_works_with_wrong_settings_for_it_is_what_errors_point_to(said: Call) -> None:
    answer = said("config", "show", CREDITS_PARTITIONS="6", CREDITS_PORTS="1")
    assert answer.code == 2
    assert answer.stderr.startswith("CREDITS_PORTS is no setting")
    assert {row["variable"]: row["value"] for row in answer.rows}["CREDITS_PARTITIONS"] == "6"


ROWS = [{"tenant_id": "t-1", "balance": "20.5"}, {"tenant_id": "[red]t-2", "balance": "-1"}]


def test_a_person_gets_a_line_a_pool() -> None:
    pool = {"pool": "conference/MCOMEETADV", "month": "2026-03", "included": 60, "used": 48,
            "left": 12}  # fmt: skip
    assert with_pools_as_lines({"tenant_id": "t-1", "pools": [pool]}) == {
        "tenant_id": "t-1",
        "pool conference/MCOMEETADV": "48 of 60 minutes of 2026-03 used, 12 left",
    }


def test_a_terminal_gets_a_table_as_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    Output(as_json=False, quiet=False).table(ROWS, "none")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["tenant_id", "balance"], ["t-1", "20.5"], ["[red]t-2", "-1"]]


def test_a_pipe_gets_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True, quiet=False).table(ROWS, "none")
    assert [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()] == ROWS


@pytest.mark.parametrize(("quiet", "told"), [(False, "none\n"), (True, "")])
def test_prose_goes_to_stderr_unless_it_shall_be_quiet(
    capsys: pytest.CaptureFixture[str], quiet: bool, told: str
) -> None:
    Output(as_json=False, quiet=quiet).table([], "none")
    assert capsys.readouterr() == ("", told)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m streams config show | true"],
        cwd=ROOT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_schemas_are_exported_and_a_changed_copy_is_found(said: Call, tmp_path: Path) -> None:
    assert said("schemas", "check").code == 0
    written = [Path(row["file"]) for row in said("schemas", "export", str(tmp_path / "out")).rows]
    assert written
    assert said("schemas", "check", str(tmp_path / "out")).code == 0
    written[0].write_text("{}")
    answer = said("schemas", "check", str(tmp_path / "out"))
    assert (answer.code, [row["file"] for row in answer.rows]) == (1, [written[0].name])


def test_a_file_that_cannot_be_read_is_named(said: Call, tmp_path: Path) -> None:
    answer = said("tenant", "import", str(tmp_path / "none.csv"))
    assert answer.code == 1
    assert answer.stderr == f"{tmp_path / 'none.csv'}: No such file or directory.\n"
