"""The coverage table: who pays for which kind of usage, and what a licence includes.

It is configuration, a TOML text of four tables: `sources`, `pools`, `plans` and `regions`. All of
it is checked when it is read; nothing in it is left to mean a default.
"""

import re
import tomllib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from msgspec import Struct

from schemas.usage import Kind

CREDITS: Final = "credits"
FREE: Final = "free"
ANY_COUNTRY: Final = "*"
# Nobody may be charged for these, whatever a table says.
ALWAYS_FREE: Final = (Kind.EMERGENCY, Kind.FREE)
# A name stands in rows and entries with the plan's and a country's: 64 characters in all.
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,19}")
_PLAN: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_MOST_MINUTES: Final = 1_000_000


class CoverageError(Exception):
    """The table cannot be used. `faults` are sentences."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__(faults[0] + more)


class Reach(Struct, frozen=True, gc=False):
    """What a pool's minutes are good for: calls to these countries (None: any), but not to rows
    of these types."""

    countries: frozenset[str] | None = None
    not_types: frozenset[str] = frozenset()

    def covers(self, country: str, row_type: str) -> bool:
        """Whether calls by a row of the rate deck may draw on the pool."""
        if row_type in self.not_types:
            return False
        return self.countries is None or country in self.countries


class Plan(Struct, frozen=True, gc=False):
    """What one licence includes in a month: minutes by pool and country. `shared`: one pool for
    the whole tenant, whose only country is `*`. In `coupled` countries its pools end at once."""

    minutes: dict[str, dict[str, int]]
    shared: bool
    coupled: frozenset[str] = frozenset()

    def minutes_of(self, pool: str, country: str | None) -> int:
        """Minutes of one licence whose users are in a country; 0: none are included."""
        by_country = self.minutes.get(pool)
        if by_country is None:
            return 0
        found = by_country.get(country or ANY_COUNTRY)
        return by_country.get(ANY_COUNTRY, 0) if found is None else found


class Coverage(Struct, frozen=True, kw_only=True):
    """A coverage table. `free` are the kinds that never cost, `pooled` the pools that pay before
    credits, in order, for the kinds that have any. `version` is derived from the table's text."""

    free: frozenset[Kind]
    sources: dict[Kind, tuple[str, ...]]
    pooled: dict[Kind, tuple[str, ...]] = {}
    reaches: dict[str, Reach] = {}
    plans: dict[str, Plan] = {}
    version: str = "none"


def _table(sources: Mapping[Kind, tuple[str, ...]]) -> dict[str, Any]:
    free = frozenset(kind for kind, said in sources.items() if said == (FREE,))
    pooled = {kind: said[:-1] for kind, said in sources.items() if len(said) > 1}
    return {"free": free, "sources": dict(sources), "pooled": pooled}


def without_pools(free: frozenset[Kind]) -> Coverage:
    """A table that knows no included minutes: what is not free is paid from credits."""
    return Coverage(**_table({kind: (FREE if kind in free else CREDITS,) for kind in Kind}))


def parse_coverage(text: str) -> Coverage:
    """Read and check a table. Raises CoverageError with every fault."""
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CoverageError([f"it is no TOML: {error}"]) from None
    faults: list[str] = []
    unknown = sorted(read.keys() - {"sources", "pools", "plans", "regions"})
    faults += [
        f"{name!r} is no table; known are sources, pools, plans, regions" for name in unknown
    ]
    tables = {name: _dict(read.get(name, {}), name, faults) for name in _TABLES}
    regions = {
        name: frozenset(_texts(said, f"regions.{name}", _COUNTRY, "country", faults))
        for name, said in tables["regions"].items()
    }
    reaches = {name: _reach(name, said, faults) for name, said in tables["pools"].items()}
    sources = _sources(tables["sources"], reaches, faults)
    plans = {
        name: _plan(name, said, reaches, regions, faults) for name, said in tables["plans"].items()
    }
    if faults:
        raise CoverageError(faults)
    version = sha256(text.encode()).hexdigest()[:12]
    return Coverage(**_table(sources), reaches=reaches, plans=plans, version=version)


_TABLES: Final = ("sources", "pools", "plans", "regions")


def _dict(said: Any, where: str, faults: list[str]) -> dict[str, Any]:
    if isinstance(said, dict):
        return said
    faults.append(f"{where} must be a table")
    return {}


def _texts(
    said: Any, where: str, pattern: re.Pattern[str], what: str, faults: list[str]
) -> list[str]:
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        faults.append(f"{where} must be a list of texts")
        return []
    faults += [f"{where}: {one!r} is no {what}" for one in said if not pattern.fullmatch(one)]
    return said


def _sources(
    said: dict[str, Any], reaches: Mapping[str, Reach], faults: list[str]
) -> dict[Kind, tuple[str, ...]]:
    kinds = {kind.value: kind for kind in Kind}
    sources: dict[Kind, tuple[str, ...]] = {}
    known = ", ".join((FREE, CREDITS, *reaches))
    for name, listed in said.items():
        where = f"sources.{name}"
        if name not in kinds:
            faults.append(f"{where} is no kind of usage; known are {', '.join(kinds)}")
            continue
        before = len(faults)
        texts = tuple(_texts(listed, where, re.compile(".*", re.DOTALL), "source", faults))
        faults += [
            f"{where}: {one!r} is no source; known are {known}"
            for one in texts
            if one not in (FREE, CREDITS) and one not in reaches
        ]
        if len(faults) > before:
            continue
        if not texts or texts[-1] not in (FREE, CREDITS) or {FREE, CREDITS} & set(texts[:-1]):
            faults.append(f"{where} must end in {FREE} or {CREDITS}, and name neither before that")
        elif len(set(texts)) < len(texts):
            faults.append(f"{where} names a source twice")
        elif texts[-1] == FREE and len(texts) > 1:
            faults.append(f"{where}: what is free takes no minutes of a pool")
        elif kinds[name] in ALWAYS_FREE and texts != (FREE,):
            faults.append(f"{where} must be {FREE}")
        sources[kinds[name]] = texts
    faults += [f"sources.{name} is missing" for name in kinds if name not in said]
    return sources


def _reach(name: str, said: Any, faults: list[str]) -> Reach:
    where = f"pools.{name}"
    if not _NAME.fullmatch(name) or name in (FREE, CREDITS):
        faults.append(f"{where}: a pool's name has small letters, digits and _, 20 at most")
    members = _dict(said, where, faults)
    faults += [
        f"{where}.{one} is unknown; known are countries, not_types"
        for one in members
        if one not in ("countries", "not_types")
    ]
    countries = None
    if "countries" in members:
        listed = _texts(members["countries"], f"{where}.countries", _COUNTRY, "country", faults)
        countries = frozenset(listed)
    not_types = _texts(
        members.get("not_types", []), f"{where}.not_types", _NAME, "type of a row", faults
    )
    return Reach(countries, frozenset(not_types))


def _plan(
    name: str,
    said: Any,
    reaches: Mapping[str, Reach],
    regions: Mapping[str, frozenset[str]],
    faults: list[str],
) -> Plan:
    where = f"plans.{name}"
    if not _PLAN.fullmatch(name):
        faults.append(f"{where}: a plan is named by letters, digits, _ . -, 32 at most")
    members = dict(_dict(said, where, faults))
    coupled = frozenset(
        _texts(members.pop("coupled", []), f"{where}.coupled", _COUNTRY, "country", faults)
    )
    minutes: dict[str, dict[str, int]] = {}
    shared = {not isinstance(one, dict) for one in members.values()}
    if len(shared) != 1:
        faults.append(f"{where} must have pools, either all by country or all for the whole tenant")
    for pool, included in members.items():
        if pool not in reaches:
            faults.append(f"{where}.{pool} is no pool; known are {', '.join(reaches)}")
        by_country = included if isinstance(included, dict) else {ANY_COUNTRY: included}
        minutes[pool] = _by_country(by_country, f"{where}.{pool}", regions, faults)
    return Plan(minutes, shared == {True}, coupled)


def _by_country(
    said: dict[str, Any], where: str, regions: Mapping[str, frozenset[str]], faults: list[str]
) -> dict[str, int]:
    # A country's own minutes go before those of its region, the first region before another.
    minutes: dict[str, int] = {}
    for own in (False, True):
        for name, count in said.items():
            if type(count) is not int or not 0 < count <= _MOST_MINUTES:
                faults.append(f"{where}: {count!r} is no number of minutes above zero")
            elif name in regions and not own:
                for country in regions[name]:
                    minutes.setdefault(country, count)
            elif name not in regions and (name == ANY_COUNTRY or _COUNTRY.fullmatch(name)):
                minutes[name] = count
            elif name not in regions:
                faults.append(f"{where}: {name!r} is neither a country nor a region")
        if faults:
            break
    return minutes
