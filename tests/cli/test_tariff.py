"""Checking, comparing and publishing decks, as far as no broker is needed."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import Answer

Call = Callable[..., Answer]
HEADER = "Destination Name,Destination Type,Country,Prefix,Price / min,Increment\n"


@pytest.fixture
def deck(tmp_path: Path) -> Callable[..., str]:
    """Write a deck; its path."""

    def write(*rows: str, name: str = "deck.csv") -> str:
        path = tmp_path / name
        path.write_text(HEADER + "".join(f"A,mobile,GB,{row}\n" for row in rows))
        return str(path)

    return write


def test_a_sound_deck_has_nothing_to_complain_about(said: Call, deck: Callable[..., str]) -> None:
    answer = said("tariff", "check", deck("44,0.1,", "447,0.2,"))
    assert (answer.code, answer.rows) == (0, [])
    assert answer.stderr == "2 prefixes, 0 errors, 0 warnings\n"


def test_suspicions_are_told_and_faults_end_with_1(said: Call, deck: Callable[..., str]) -> None:
    answer = said("tariff", "check", deck("44,0.1,", "447,2,"))
    assert answer.code == 0
    assert answer.row == {
        "line": 3,
        "level": "warning",
        "what": "prefix 447: more than ten times the price of its parent 44",
    }
    answer = said("tariff", "check", deck("44,0.1,", "44,2,", "4x,1,", "33,-1,"))
    assert answer.code == 1
    assert [(row["line"], row["level"]) for row in answer.rows] == [
        (3, "error"), (4, "error"), (5, "error"),
    ]  # fmt: skip


def test_what_is_no_deck_is_a_fault(said: Call, tmp_path: Path) -> None:
    path = tmp_path / "deck.csv"
    for content, what in ((b"\xff\xfe", "no UTF-8 text (byte 0)"), (b"", "the column")):
        path.write_bytes(content)
        answer = said("tariff", "check", str(path))
        assert answer.code == 1
        assert answer.row["what"].startswith(what)


def test_two_decks_are_compared_by_prefix(said: Call, deck: Callable[..., str]) -> None:
    before = deck("44,0.1,", "33,0.1,", "49,0.1,", "39,0.10,")
    after = deck("44,0.2,6", "49,0.1,", "41,0.3,", "39,0.1,", name="after.csv")
    answer = said("tariff", "diff", before, after)
    assert [(row["prefix"], row["what"], row["changed"]) for row in answer.rows] == [
        ("33", "gone", []),
        ("41", "new", []),
        ("44", "changed", ["per_minute", "increment_s"]),
    ]


def test_decks_with_windows_are_compared_by_what_they_say(said: Call, tmp_path: Path) -> None:
    paths = []
    for name, evening in (("a.csv", "0.05"), ("b.csv", "0.050"), ("c.csv", "0.06")):
        paths.append(tmp_path / name)
        paths[-1].write_text(
            HEADER.rstrip() + ",Windows,Weight\n"
            "A,mobile,GB,44,0.1,,,\n"
            f"A,mobile,GB,44,{evening},,18:00-08:00,1\n"
        )
    before, alike, dearer = map(str, paths)
    assert said("tariff", "diff", before, alike).rows == []
    [row] = said("tariff", "diff", before, dearer).rows
    assert (row["prefix"], row["changed"]) == ("44", ["per_minute", "special"])


def test_a_deck_that_is_not_there_is_missed_without_a_broker(
    said: Call, deck: Callable[..., str]
) -> None:
    answer = said("tariff", "diff", deck("44,0.1,"), "nowhere.csv")
    assert answer.code == 3
    assert "nowhere.csv is neither a file nor a published version" in answer.stderr


def test_a_version_that_begins_too_soon_is_not_published(
    said: Call, deck: Callable[..., str]
) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=9)).isoformat()
    answer = said("tariff", "publish", deck("44,0.1,"), "--effective-from", soon)
    assert answer.code == 2
    assert "at least 10 minutes after it is published" in answer.stderr


def test_a_deck_with_a_fault_is_not_published(said: Call, deck: Callable[..., str]) -> None:
    answer = said("tariff", "publish", deck("44,x,"))
    assert answer.code == 1
    assert "line 2: 'x' is no price" in answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--deck", "a/b"), ("--version", "a b"), ("--effective-from", "2026-04-01"),
        ("--effective-from", "2026-04-01T00:00:00"),
    ],
)  # fmt: skip
def test_names_and_instants_are_checked(
    said: Call, deck: Callable[..., str], arguments: tuple[str, str]
) -> None:
    assert said("tariff", "publish", deck("44,0.1,"), *arguments).code == 2
