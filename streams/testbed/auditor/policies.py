"""Policies as commands say them: below what money is asked for, and how much."""

from datetime import datetime
from typing import Any, Final

from msgspec import Struct

from streams.testbed.auditor.records import nanos

_NANOS: Final = 1_000_000_000
# What a currency's smallest coin is worth, where it is not a hundredth: decimals of ISO 4217.
_DECIMALS: Final = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
# The least that may be asked for at once, in whole units, and how often that at most.
_LEAST: Final = {"JPY": 5_000, "KRW": 50_000, "HUF": 15_000, "TWD": 1_500}
_LEAST_ELSEWHERE: Final = 50
MOST_TIMES: Final = 2_000


def decimals(currency: str) -> int:
    """Decimals of a currency's smallest coin."""
    return next((count for count, known in _DECIMALS.items() if currency in known.split()), 2)


def least(currency: str) -> int:
    """The least that may be asked for at once, in nanos."""
    return _LEAST.get(currency, _LEAST_ELSEWHERE) * _NANOS


def to_coins(amount: int, currency: str) -> int:
    """Nanos, up to the next whole coin."""
    coin: int = 10 ** (9 - decimals(currency))
    return -(-amount // coin) * coin


# Where a row keeps what a policy says; amounts are nanos there, and the first is its version.
AMOUNTS: Final = {
    "trigger": 2,
    "amount": 5,
    "target": 6,
    "min_amount": 7,
    "max_amount": 8,
    "daily_cap": 9,
    "weekly_cap": 10,
    "monthly_cap": 11,
}
PLAIN: Final = {"enabled": 1, "compare": 3, "method": 4, "max_per_day": 12, "cooldown_s": 13}
VELOCITY: Final = 14
# What holds where nothing is said.
_UNSAID: Final = {
    "enabled": False,
    "trigger": "0",
    "compare": "lt",
    "method": "fixed",
    "amount": "0",
    "target": "0",
    "max_per_day": 3,
    "cooldown_s": 900,
}


class Policy(Struct, frozen=True):
    """A policy as its command says it. `since` is when it came into force."""

    said: dict[str, Any]
    since: datetime

    @property
    def enabled(self) -> bool:
        """Whether anything may be asked for."""
        return bool(self._plain("enabled"))

    @property
    def trigger(self) -> int:
        """Below what money is asked for, in nanos."""
        return self._nanos("trigger")

    @property
    def max_per_day(self) -> int:
        """How often money may come in a day; the one limit that is there unless it is said."""
        return int(self._plain("max_per_day"))

    @property
    def cooldown_s(self) -> int:
        """For how long nothing is asked after an answer."""
        return int(self._plain("cooldown_s"))

    @property
    def velocity(self) -> dict[str, int]:
        """What may be spent on each risk class in a day, in nanos, unless a person approves."""
        return {risk: nanos(text) for risk, text in (self.said.get("velocity") or {}).items()}

    def cap(self, name: str) -> int | None:
        """A cap, or another bound, in nanos; None when it is off."""
        return None if self.said.get(name) is None else self._nanos(name)

    def below(self, available: int) -> bool:
        """Whether that little is reason to ask."""
        if self._plain("compare") == "le":
            return available <= self.trigger
        return available < self.trigger

    def amount(self, available: int, currency: str) -> int:
        """How much to ask for."""
        method = self._plain("method")
        one = self._nanos("amount")
        missing = max(0, self.trigger - available)
        if method == "target":
            wanted = self._nanos("target") - available
            if wanted <= 0:
                return 0
            wanted = max(wanted, least(currency))
        elif method == "gap_plus_amount":
            wanted = missing + one
        elif method == "fixed_multiple":
            wanted = one * max(1, -(-missing // max(1, one)))
        else:
            wanted = one
        if self.said.get("min_amount") is not None:
            wanted = max(wanted, nanos(self.said["min_amount"]))
        if self.said.get("max_amount") is not None and method != "target":
            wanted = min(wanted, nanos(self.said["max_amount"]))
        return to_coins(wanted, currency)

    def in_row(self) -> list[Any]:
        """As a row keeps it, without its version."""
        row: list[Any] = [None] * (VELOCITY + 1)
        for name, place in PLAIN.items():
            row[place] = self._plain(name)
        for name, place in AMOUNTS.items():
            row[place] = self._nanos(name) if name in _UNSAID else self.cap(name)
        row[VELOCITY] = sorted([risk, most] for risk, most in self.velocity.items())
        return row[1:]

    def _plain(self, name: str) -> Any:
        return self.said.get(name, _UNSAID[name])

    def _nanos(self, name: str) -> int:
        return nanos(self.said.get(name) or "0")
