"""The verdict: which invariants there are, and what became of each."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from msgspec import Struct

from streams.testbed.auditor.records import shown

HOLDS: Final = 0
VIOLATED: Final = 1
UNKNOWN: Final = 75

INVARIANTS: Final = {
    "conservation": "entries sum to every balance, in the row and as published",
    "lots": "no lot is below zero, what has expired pays for nothing later, grants come as asked",
    "at_most_once": "no event is charged twice, and no command is decided twice",
    "at_least_once": "every event is booked, a repeat, or a dead letter byte for byte",
    "one_request": "one id per epoch and attempt, one unanswered auto-recharge at a time",
    "recharge": "what is asked for is needed, allowed, told, by the policy; recharges were asked",
    "credit_once": "every payment is credited as often and as much as it was paid",
    "answered": "every command has its one answer",
    "settings": "what is set for a tenant is what applied commands say, all of it and no more",
    "sequence": "entries are numbered 1, 2, 3 … without gap or step back",
    "chain": "every entry's hash follows from the one before it",
    "correction": "what is corrected is reversed once, by what it had cost, and linked both ways",
    "price": "every charge is what the deck it names says, and that version was in force for it",
    "pools": "included minutes pay first, as far as licences go and never further",
    "holds": "open calls hold what was told of them, which sums up, and none outlives its signs of "
    "life",
    "changelog": "rows are the fold of the ledger; the position row has their count and sums",
    "partition": "every record stands on the partition of its key",
    "cause": "every entry names a record that is there and asks for it, and for no more, every "
    "request one that is there",
    "stable": "no transaction stays open",
    "expectation": "what the load generator sent came out as it foresaw",
}
SHOWN: Final = 20


class Finding(Struct):
    """What became of one invariant."""

    violations: int = 0
    shown: list[str] = []
    unknown: list[str] = []


class Upstream(Struct):
    """What carriers say that calls have cost, beside what tenants were charged for them, in 10⁻⁹;
    `dearer` are calls that cost more there than here."""

    calls: int = 0
    told: int = 0
    charged: int = 0
    dearer: int = 0


class Report:
    """The verdict. What carriers say, by currency (`upstream`), is no part of it."""

    def __init__(self) -> None:
        self.findings = {name: Finding() for name in INVARIANTS}
        self.counts: dict[str, int] = {}
        self.dead_letters: dict[str, int] = {}
        self.upstream: dict[str, Upstream] = {}
        self.expectation_asked = False

    def violate(self, invariant: str, text: str) -> None:
        """Something is wrong, here."""
        finding = self.findings[invariant]
        finding.violations += 1
        if len(finding.shown) < SHOWN:
            finding.shown.append(text)

    def unknown(self, invariant: str, why: str) -> None:
        """An invariant could not be checked."""
        reasons = self.findings[invariant].unknown
        if why not in reasons and len(reasons) < SHOWN:
            reasons.append(why)

    def count(self, name: str, by: int = 1) -> None:
        """Count what was looked at."""
        self.counts[name] = self.counts.get(name, 0) + by

    def cross_check(self, currency: str, told: int, charged: int) -> None:
        """A carrier has told what a charged call has cost."""
        sums = self.upstream.setdefault(currency, Upstream())
        sums.calls += 1
        sums.told += told
        sums.charged += charged
        sums.dearer += told > charged

    def compare(self, expected: Mapping[str, Any]) -> None:
        """Hold what was counted against what a load generator foresaw."""
        self.expectation_asked = True
        for reason, count in expected["by_reason"].items():
            found = self.dead_letters.get(reason, 0)
            if found != count:
                self.violate(
                    "expectation", f"{count} dead letters {reason} foreseen, {found} found"
                )
        found = self.counts.get("distinct_ids", 0)
        if found != expected["distinct_ids"]:
            self.violate(
                "expectation", f"{expected['distinct_ids']} events sent to be booked, {found} found"
            )

    @property
    def exit_code(self) -> int:
        """0 holds, 1 violated, 75 unknown: unknown is never a pass."""
        if any(finding.violations for finding in self.findings.values()):
            return VIOLATED
        if any(finding.unknown for finding in self.findings.values()):
            return UNKNOWN
        return HOLDS

    def lines(self) -> list[str]:
        """The verdict for a person."""
        lines = []
        reasons: list[str] = []
        for name, finding in self.findings.items():
            # What many could not be checked for is said once, below the last of them.
            unknown = [] if finding.violations else finding.unknown
            if unknown != reasons:
                lines += [f"          - {text}" for text in reasons]
            reasons = unknown
            if name == "expectation" and not self.expectation_asked:
                lines.append(f"not asked {name}: {INVARIANTS[name]}")
            elif finding.violations:
                lines.append(f"VIOLATED  {name}: {finding.violations} times; {INVARIANTS[name]}")
                lines += [f"          - {text}" for text in finding.shown]
            elif finding.unknown:
                lines.append(f"unknown   {name}: {INVARIANTS[name]}")
            else:
                lines.append(f"holds     {name}: {INVARIANTS[name]}")
        lines += [f"          - {text}" for text in reasons]
        counted = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        lines.append(f"looked at {counted or 'nothing'}")
        if self.dead_letters:
            letters = ", ".join(f"{n:,} {why}" for why, n in sorted(self.dead_letters.items()))
            lines.append(f"dead letters: {letters}")
        for currency, sums in sorted(self.upstream.items()):
            told, charged = (f"{Decimal(shown(one)):,.2f}" for one in (sums.told, sums.charged))
            lines.append(
                f"upstream: {sums.calls:,} calls cost {told} {currency} there and {charged} here, "
                f"{sums.dearer:,} of them more there"
            )
        word = {HOLDS: "the books hold", VIOLATED: "VIOLATED", UNKNOWN: "unknown"}
        lines.append(f"verdict: {word[self.exit_code]}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The verdict for a program."""
        return {
            "exit_code": self.exit_code,
            "invariants": {
                name: {
                    "violations": finding.violations,
                    "shown": finding.shown,
                    "unknown": finding.unknown,
                }
                for name, finding in self.findings.items()
            },
            "counts": self.counts,
            "dead_letters": self.dead_letters,
            "upstream": {
                currency: {
                    "calls": sums.calls,
                    "told": shown(sums.told),
                    "charged": shown(sums.charged),
                    "dearer": sums.dearer,
                }
                for currency, sums in self.upstream.items()
            },
        }
