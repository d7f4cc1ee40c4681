"""Golden cases: ours pass, and a case that is wrong fails."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from streams.billing.vectors import SUPPORTED, CaseResult, VectorError, run_file

FOLDER = Path(__file__).parent / "vectors"
FILES = sorted(FOLDER.glob("*.json"))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return document


def run(document: dict[str, Any]) -> list[CaseResult]:
    return run_file(document, deck_text=(FOLDER / "deck.csv").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_golden_case_passes(path: Path) -> None:
    results = run(load(path))
    assert [result for result in results if result.status != "pass"] == []
    assert results


def test_there_are_cases_of_every_kind() -> None:
    assert {load(path)["kind"] for path in FILES} == {"rating", "grants", "recharge", "e164"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_case_with_another_expectation_fails(path: Path) -> None:
    document = load(path)
    for case in document["cases"]:
        if "expected_prefix" in case:
            case["expected_prefix"] = "31415"
        elif "reason" in case["expected"]:
            case["expected"]["reason"] = "because"
        else:
            case["expected"] = dict.fromkeys(case["expected"], "31415")
    assert {result.status for result in run(document)} == {"fail"}


def test_what_this_build_does_not_support_is_skipped_by_name() -> None:
    case = load(FOLDER / "rating.json")["cases"][0]
    case["needs"] = ["time_travel", next(iter(SUPPORTED))]
    [result] = run({"kind": "rating", "cases": [case]})
    assert (result.status, result.missing) == ("skipped", ("time_travel",))


def test_the_kind_follows_from_the_fields() -> None:
    document = load(FOLDER / "recharge.json")
    del document["kind"]
    assert {result.status for result in run(document)} == {"pass"}


@pytest.mark.parametrize(
    "document",
    [[], {}, {"schema_version": 2, "cases": []}, {"cases": [{"id": "x"}]},
     {"kind": "rating", "cases": [{"id": "x"}]}],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(document: Any) -> None:
    with pytest.raises(VectorError):
        run(document)
