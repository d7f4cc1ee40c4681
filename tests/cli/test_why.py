"""Explanations and statements as an operator asks for them."""

import csv
import io
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from schemas.notices import Withheld
from streams.billing import explain as why
from streams.cli.explain import show
from streams.cli.output import Output
from streams.settings import Settings
from tests.billing.builders import NOW
from tests.billing.test_statement import a_book, of, rechained
from tests.cli.conftest import Answer, credits_of

Call = Callable[..., Answer]


# -- statements need no server --------------------------------------------------------------------


@pytest.fixture
def statements(tmp_path: Path) -> tuple[Path, Path]:
    """A first month, and everything."""
    book = a_book()
    first, whole = tmp_path / "first.csv", tmp_path / "whole.csv"
    first.write_bytes(of(book, until=NOW + timedelta(days=30)).encode())
    whole.write_bytes(of(book).encode())
    return first, whole


def test_a_statement_is_checked_against_an_earlier_one_without_any_server(
    said: Call, statements: tuple[Path, Path]
) -> None:
    first, whole = statements
    answer = said("statement", "verify", str(whole), "--earlier", str(first))
    assert (answer.code, answer.row["earlier"], answer.row["faults"]) == (0, True, [])
    assert answer.row["closing_balance"] == "129"


def test_a_forged_statement_ends_with_1(said: Call, statements: tuple[Path, Path]) -> None:
    first, whole = statements
    honest = whole.read_bytes().decode()
    whole.write_bytes(rechained(honest, "wire-1", "wire-9").encode())
    answer = said("statement", "verify", str(whole), "--earlier", str(first))
    assert (answer.code, answer.row["earlier"]) == (1, False)
    assert "The earlier head is not in this chain" in answer.stderr
    whole.write_bytes(honest.replace(",-4,", ",-3,", 1).encode())
    assert said("statement", "verify", str(whole)).code == 1


def test_a_head_that_the_statement_does_not_reach_ends_with_75(
    said: Call, statements: tuple[Path, Path]
) -> None:
    first, whole = statements
    answer = said("statement", "verify", str(first), "--earlier", str(whole))
    assert answer.code == 75


@pytest.mark.parametrize("content", [b"", b"\xff", b"a,b\n"])
def test_what_is_no_statement_ends_with_1(said: Call, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "no.csv"
    file.write_bytes(content)
    answer = said("statement", "verify", str(file))
    assert answer.code == 1
    assert answer.stderr.startswith("This is no statement: ")


def test_an_explanation_on_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    told = why.entry(msgspec.json.decode(a_book().entries[1]))
    show(Output(as_json=False, quiet=False), told)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("entry 2 of t-1, ")
    assert lines[1] == "240 s at 1 a minute and a fee of 0 come to 4 USD"
    assert lines[2].startswith("caused by test/")
    assert "(telephony.call.usage.v1/0/" in lines[2]
    assert "  increments 60/60: 240 s are billed as 240 s" in lines


# -- on a real broker -----------------------------------------------------------------------------


@pytest.mark.broker
def test_a_tenants_recharge_its_entries_and_its_statement_explain_themselves(
    office: Settings, tmp_path: Path
) -> None:
    credits, tenant = credits_of(office), f"t-{secrets.token_hex(4)}"
    assert credits("explain", tenant).code == 3
    assert credits("tenant", "open", tenant, "--opening-balance", "60").code == 0
    assert credits("explain", tenant).code == 3
    policy = ("--trigger", "50", "--amount", "100", "--monthly-cap", "500")
    assert credits("settings", "set", tenant, *policy).code == 0

    assert credits("adjust", tenant, "-20", "--reason", "a test").code == 0
    asked = credits("explain", tenant).row
    assert asked["why"] == "100 asked for: every guard let it pass"
    guards = [line.partition(":")[0] for line in asked["considered"]]
    assert guards[: len(Withheld)] == [guard.value for guard in Withheld]
    assert "above_trigger: 40 is available, short of the trigger of 50" in asked["considered"]
    recharge_id = asked["about"].removeprefix("recharge ")

    early = credits("recharge", "resolve", tenant, recharge_id, "--not-paid")
    assert (early.code, "too_early" in early.stderr) == (4, True)
    paid = ("--paid", "--payment-id", "p-1", "--amount", "100")
    assert credits("recharge", "resolve", tenant, recharge_id, *paid).code == 0
    story = credits("explain", tenant, "--recharge", recharge_id).row
    assert any("a person has decided: paid" in line for line in story["considered"])
    assert any("entry 3: recharge of 100 USD" in line for line in story["considered"])

    assert credits("adjust", tenant, "-100", "--reason", "a test").code == 0
    held = credits("explain", tenant).row
    assert held["about"] == "withheld: cooling"
    assert held["why"].startswith("cooling: it is too early: wait until ")

    entry = credits("explain", tenant, "--entry", "2").row
    assert (entry["why"], entry["topic"]) == ("adjustment of -20 USD", "credits.command.v1")
    assert "reason: a test" in entry["considered"]
    assert credits("explain", tenant, "--entry", "9").code == 3

    shown = credits("statement", "show", tenant)
    assert shown.code == 0
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert rows[-1]["balance_after"] == credits("balance", tenant).row["balance"] == "40"
    file = tmp_path / "statement.csv"
    file.write_text(shown.stdout)
    checked = credits("statement", "verify", str(file), "--head", rows[2]["hash"])
    assert (checked.code, checked.row["entries"]) == (0, 4)
