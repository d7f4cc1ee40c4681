"""The auditor's own reckoning of included minutes: who has how many, and which call took them.

Like the auditor it shares no code with what it audits. It reads the coverage table's text by itself
and works out, entry by entry in the order of the ledger, what a call had to take.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

from msgspec import Struct

_KEPT: Final = timedelta(days=35)
# Pool, month and how many minutes it gave.
Line = tuple[str, str, int]


def lines_of(pools: Iterable[Mapping[str, Any]]) -> list[Line]:
    """What an entry says that pools gave."""
    return [(one["pool"], one["month"], one["minutes"]) for one in pools]


class Coverage:
    """A coverage table as its text says it; that of the package when no path is given."""

    def __init__(self, path: Path | None = None) -> None:
        text = (files("streams") / "default_coverage.toml" if path is None else path).read_bytes()
        read = tomllib.loads(text.decode("utf-8-sig"))
        self.sources: dict[str, list[str]] = read["sources"]
        self.free = {kind for kind, sources in self.sources.items() if sources == ["free"]}
        self._pools: dict[str, dict[str, list[str]]] = read.get("pools", {})
        self._plans: dict[str, dict[str, Any]] = read.get("plans", {})
        self._regions: dict[str, list[str]] = read.get("regions", {})

    def reaches(self, pool: str, row: Mapping[str, str]) -> bool:
        """Whether a pool's minutes are good for calls by a row of a deck."""
        said = self._pools.get(pool, {})
        if row.get("Destination Type") in said.get("not_types", []):
            return False
        return "countries" not in said or row.get("Country") in said["countries"]

    def pools_of(self, plan: str) -> dict[str, Any]:
        """What a plan says of each of its pools."""
        return {name: said for name, said in self._plans.get(plan, {}).items() if name != "coupled"}

    def coupled(self, plan: str, country: str) -> bool:
        """Whether the plan's pools end together in a country."""
        return country in self._plans.get(plan, {}).get("coupled", [])

    def minutes(self, plan: str, pool: str, country: str) -> int:
        """Minutes of one licence."""
        said = self.pools_of(plan).get(pool, 0)
        if isinstance(said, int):
            return said
        if country in said:
            return int(said[country])
        for region, minutes in said.items():
            if country in self._regions.get(region, []):
                return int(minutes)
        return int(said.get("*", 0))


class Licence(Struct, frozen=True):
    """One applied command: so many licences from an instant on. `known_at` is when it was."""

    plan: str
    country: str
    count: int
    since: datetime
    known_at: datetime


class Call(Struct, frozen=True):
    """What of a booked call decides about minutes; `row` is that of the deck that priced it."""

    kind: str
    capability: str | None
    country: str | None
    started: datetime
    duration_s: int
    row: Mapping[str, str]


class Booked(Struct, frozen=True):
    """An entry: what it says of pools, and the call that caused it, if that is at hand. Of a
    reversal `undone` is what the reversed entry took, if that is known."""

    seq: int
    kind: str
    amount: int
    booked_at: datetime
    lines: list[dict[str, Any]]
    call: Call | None = None
    undone: list[Line] | None = None


class Reckoning:
    """One tenant's included minutes. `used` goes on from an earlier run."""

    def __init__(
        self,
        coverage: Coverage,
        time_zone: str,
        licences: list[Licence],
        used: dict[tuple[str, str], int] | None = None,
    ) -> None:
        self._coverage = coverage
        self._zone = ZoneInfo(time_zone)
        self._licences = licences
        self.used = dict(used or {})

    def judge(self, entries: Iterable[Booked], *, complete: bool) -> Iterator[str]:
        """What is wrong with entries, told in the ledger's order. Not `complete`: licences may be
        unknown, so only what the entries say of themselves is held against each other."""
        for entry in sorted(entries, key=lambda one: one.seq):
            lines = lines_of(entry.lines)
            booked = entry.kind in ("charge", "pool")
            if complete and booked and entry.call is not None:
                right = [
                    self._due(entry.call, entry.booked_at, known)
                    for known in self._known(entry.booked_at)
                ]
                if lines not in right:
                    yield f"{entry.seq} took {_said(lines)}, where {_said(right[-1])} was due"
            if entry.kind == "reversal" and entry.undone is not None:
                back = self._returned(entry.undone, entry.booked_at)
                if lines != back:
                    yield f"{entry.seq} moves {_said(lines)}, where {_said(back)} was due"
            if lines and booked and (entry.kind == "pool") != (entry.amount == 0):
                yield f"{entry.seq} is of kind {entry.kind}, its amount is {entry.amount}"
            for one in entry.lines:
                bucket = (one["pool"], one["month"])
                after = self.used[bucket] = self.used.get(bucket, 0) + one["minutes"]
                if after != one["used"] or after < 0:
                    yield f"{entry.seq}: {one['used']} used of {bucket}, the entries sum to {after}"
                if after > one.get("included", after):
                    yield f"{entry.seq}: {after} used of {bucket}, {one['included']} are included"

    def _known(self, at: datetime) -> Iterator[list[Licence]]:
        """The commands that an entry booked at an instant can have followed: all that were
        applied before it, and of those of its very instant as many as came first."""
        before = [one for one in self._licences if one.known_at < at]
        same = [one for one in self._licences if one.known_at == at]
        for count in range(len(same) + 1):
            yield before + same[:count]

    def _returned(self, undone: list[Line], booked_at: datetime) -> list[Line]:
        """What goes back: all of it, but nothing to months that are over for good."""
        back = []
        for pool, month, minutes in undone:
            year, _, number = month.partition("-")
            if booked_at <= self._end_of(datetime(int(year), int(number), 1, tzinfo=UTC)) + _KEPT:
                back.append((pool, month, -minutes))
        return back

    def _due(self, call: Call, booked_at: datetime, known: list[Licence]) -> list[Line]:
        try:
            local = call.started.astimezone(self._zone)
        except OverflowError:
            local = call.started
        month = f"{local.year:04d}-{local.month:02d}"
        if booked_at > self._end_of(local) + _KEPT:
            return []
        held = self._held(call.started, known)
        rest = -(-call.duration_s // 60)
        lines: list[Line] = []
        taken: dict[str, int] = {}
        for pool in self._coverage.sources.get(call.kind, [])[:-1]:
            if not self._coverage.reaches(pool, call.row):
                continue
            for (plan, country), count in sorted(held.items()):
                said = self._coverage.pools_of(plan)
                if pool not in said or not self._users(call, plan, country, held):
                    continue
                name = _name(pool, plan, country)
                left = self._left(plan, country, count, pool, month, taken)
                minutes = min(rest, left)
                if minutes > 0:
                    lines.append((name, month, minutes))
                    taken[name] = minutes
                    rest -= minutes
        return lines

    def _users(
        self, call: Call, plan: str, country: str, held: Mapping[tuple[str, str], int]
    ) -> bool:
        if not country:
            return True
        if call.capability != plan:
            return False
        if call.country is not None:
            return call.country == country
        return [one for one, _ in held].count(plan) == 1

    def _left(
        self,
        plan: str,
        country: str,
        count: int,
        pool: str,
        month: str,
        taken: Mapping[str, int],
    ) -> int:
        rests = {}
        for one in self._coverage.pools_of(plan):
            name = _name(one, plan, country)
            included = self._coverage.minutes(plan, one, country) * count
            if included or one == pool:
                gone = self.used.get((name, month), 0) + taken.get(name, 0)
                rests[one] = max(0, included - gone)
        if self._coverage.coupled(plan, country) and 0 in rests.values():
            return 0
        return rests[pool]

    def _held(self, at: datetime, known: list[Licence]) -> dict[tuple[str, str], int]:
        """Licences in force at an instant, by plan and country."""
        held: dict[tuple[str, str], int] = {}
        for one in sorted(known, key=lambda one: one.since):
            if one.since <= at:
                held[one.plan, one.country] = one.count
        return {which: count for which, count in held.items() if count}

    def _end_of(self, local: datetime) -> datetime:
        year, month = (local.year, local.month + 1) if local.month < 12 else (local.year + 1, 1)
        if year > 9999:
            return datetime.max.replace(tzinfo=UTC) - _KEPT
        return datetime(year, month, 1, tzinfo=self._zone).astimezone(UTC)


def _name(pool: str, plan: str, country: str) -> str:
    return f"{pool}/{plan}/{country}" if country else f"{pool}/{plan}"


def _said(lines: list[Line]) -> str:
    texts = [f"{minutes} min of {pool} in {month}" for pool, month, minutes in lines]
    return ", ".join(texts) or "no minutes"
