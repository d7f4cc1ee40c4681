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
    [[], {}, {"cases": {}}, {"schema_version": 2, "cases": []}],
)
def test_a_file_that_makes_no_sense_is_refused(document: Any) -> None:
    with pytest.raises(VectorError):
        run(document)


def test_a_case_that_cannot_be_read_fails_alone_and_says_why() -> None:
    document = load(FOLDER / "rating.json")
    sound = document["cases"][0]
    broken = {name: value for name, value in sound.items() if name != "duration_s"}
    nonsense: list[Any] = ["text", None, {"id": "no-kind"}, {**sound, "needs": 7}]
    results = run_file({"cases": [broken, *nonsense, sound]})
    assert [result.status for result in results] == ["fail"] * 5 + ["pass"]
    assert results[0].got == {"unreadable": "'duration_s' is missing"}
    assert all("unreadable" in result.got for result in results[:-1])


def test_an_e164_case_without_a_deck_fails_and_says_what_it_needs() -> None:
    results = run_file(load(FOLDER / "e164.json"))
    assert {result.status for result in results} == {"fail"}
    assert "--deck" in results[0].got["unreadable"]


def a_policy(case: str, **changes: Any) -> dict[str, Any]:
    """One of our recharge cases with another policy."""
    found = next(one for one in load(FOLDER / "recharge.json")["cases"] if one["id"] == case)
    return {**found, "policy": found["policy"] | changes.pop("policy", {})} | changes


@pytest.mark.parametrize(
    ("case", "got"),
    [
        (a_policy("minimum-raises"), ("10", "below_trigger")),
        (a_policy("maximum-clips"), ("90", "below_trigger")),
        (a_policy("backed-off-twice"), ("200", "below_trigger")),
        (a_policy("target-below-trigger-is-rejected"), ("49", "below_trigger")),
        (a_policy("net-of-pending"), ("250", "below_trigger")),
        (a_policy("le-fires-at-the-trigger"), (None, "above_trigger")),
    ],
    ids=lambda value: value["id"] if isinstance(value, dict) else "",
)
def test_a_feature_that_is_not_named_does_not_decide_a_recharge(
    case: dict[str, Any], got: tuple[str | None, str]
) -> None:
    [result] = run_file({"cases": [{**case, "needs": []}]})
    assert (result.got["request"], result.got["reason"]) == got


def test_a_target_that_is_reached_is_called_so() -> None:
    case = a_policy("up-to-the-target", policy={"target": "25", "compare": "le"})
    case |= {"state": {"balance": "25"}, "needs": ["compare_le"]}
    [result] = run_file({"cases": [case]})
    assert result.got == {"request": None, "reason": "target_reached"}


@pytest.mark.parametrize(
    ("name", "rests"),
    [("voided-money-is-gone", {"a": "5"}), ("promotional-before-paid", {"a": "6", "b": "10"})],
)
def test_a_feature_that_is_not_named_does_not_decide_a_grant(
    name: str, rests: dict[str, str]
) -> None:
    found = next(one for one in load(FOLDER / "grants.json")["cases"] if one["id"] == name)
    [result] = run_file({"cases": [{**found, "needs": []}]})
    assert result.got["grants"] == rests


def test_a_continuation_that_is_not_named_pays_its_fee() -> None:
    found = next(one for one in load(FOLDER / "rating.json")["cases"] if one.get("continuation"))
    [result] = run_file({"cases": [{**found, "needs": []}]})
    assert result.status == "fail"


@pytest.mark.parametrize(
    ("first", "step", "cost"),
    [(0, 6, "0.012"), ("0", 6, "0.012"), (None, None, "0.06"), (30, 6, "0.03")],
)
def test_no_first_increment_means_that_the_following_one_counts_from_the_start(
    first: object, step: object, cost: str
) -> None:
    row = {"prefix": "1", "per_minute": "0.06", "connect_fee": "0"}
    row |= {"initial_increment_s": first, "increment_s": step}  # type: ignore[dict-item]
    case = {"destination": "12", "duration_s": 7, "rates": [row]}
    [result] = run_file({"cases": [case | {"expected_prefix": "1", "expected_cost": cost}]})
    assert result.status == "pass", result


@pytest.mark.parametrize("increments", [{"increment_s": 0}, {"initial_increment_s": -1}])
def test_an_increment_that_is_none_is_no_minute(increments: dict[str, int]) -> None:
    row = {"prefix": "1", "per_minute": "0.06"} | increments
    case = {"id": "x", "destination": "12", "duration_s": 219, "rates": [row]}
    [result] = run_file({"cases": [case | {"expected_cost": "0.24", "expected_prefix": "1"}]})
    assert "increment" in result.got["unreadable"]


@pytest.mark.parametrize(
    ("duration_s", "increment_s", "cost"),
    [("219.0", 1, "0.219"), ("218.2", 1, "0.219"), ("8", "6.0", "0.013"), (7, "6", "0.007")],
)
def test_durations_are_decimal_text_or_whole_numbers(
    duration_s: object, increment_s: object, cost: str
) -> None:
    row = {"prefix": "1", "per_minute": "0.06", "initial_increment_s": "1"}
    row |= {"increment_s": increment_s}  # type: ignore[dict-item]
    case = {"destination": "12", "duration_s": duration_s, "rates": [row], "needs": None}
    [result] = run_file({"cases": [case | {"expected_prefix": "1", "expected_cost": cost}]})
    assert result.status == "pass", result


def test_lists_that_are_null_are_empty() -> None:
    case = a_policy("a-cent-below") | {"pending": None, "history": None, "needs": None}
    assert run_file({"cases": [case]})[0].status == "pass"
    found = load(FOLDER / "grants.json")["cases"][5]
    assert run_file({"cases": [found | {"usage": None, "needs": None}]})[0].status == "pass"


def test_every_case_has_a_name_of_its_own_and_says_where_its_figures_come_from() -> None:
    cases = [(load(path).get("source"), one) for path in FILES for one in load(path)["cases"]]
    names = [one["id"] for _, one in cases]
    assert len(set(names)) == len(names)
    unsaid = [one["id"] for source, one in cases if not (one.get("source") or source)]
    assert unsaid == []


@pytest.mark.parametrize(
    ("name", "rests"),
    [
        ("an-allowance-is-full-again", {"a": "6"}),
        ("a-maximum-cuts", {"a": "6"}),
        ("a-minimum-fills", {"a": "6"}),
    ],
)
def test_a_period_that_is_not_named_does_not_decide_a_grant(
    name: str, rests: dict[str, str]
) -> None:
    cases = load(FOLDER / "grants-features.json")["cases"]
    found = next(one for one in cases if one["id"] == name)
    [result] = run_file({"cases": [{**found, "needs": []}]})
    assert result.got["grants"] == rests
