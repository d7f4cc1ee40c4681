"""What the core's functions answer with: plain data that nobody changes once it is made.

Classes and not structs (see `events`): two are equal only when they are one object.
"""

from datetime import datetime
from typing import Final, final

from mypy_extensions import mypyc_attr

from schemas.funding import RechargeRequest
from schemas.ledger import EntryKind
from schemas.notices import DeadLetterReason, Notice, Withheld
from streams.billing.account import Account
from streams.billing.coverage import FREE_KINDS
from streams.billing.coverage_table import Coverage, without_pools
from streams.billing.parts import Grant, Hold, Payment, Policy
from streams.billing.persons import PersonKeys
from streams.billing.rates import Decks, Rate, Tariff

_WITHOUT_POOLS: Final = without_pools(FREE_KINDS)


@final
@mypyc_attr(acyclic=True)
class Terms:
    """What is in force for an event: the tariff of `CREDITS_DECK`, whether the balance may be
    stale (the shard is behind), how long a recharge request waits for its answer, once any are
    published, the rate decks by name and time, who pays for which kind of usage, and the keys under
    which entries name persons."""

    __slots__ = ("coverage", "decks", "persons", "result_timeout_s", "stale", "tariff")

    def __init__(
        self,
        tariff: Tariff,
        stale: bool = False,
        result_timeout_s: int = 900,
        decks: Decks | None = None,
        coverage: Coverage = _WITHOUT_POOLS,
        persons: PersonKeys | None = None,
    ) -> None:
        self.tariff = tariff
        self.stale = stale
        self.result_timeout_s = result_timeout_s
        self.decks = decks
        self.coverage = coverage
        self.persons = persons

    def while_behind(self) -> "Terms":
        """The same terms where the balance may be stale."""
        return Terms(
            self.tariff, True, self.result_timeout_s, self.decks, self.coverage, self.persons
        )

    def with_decks(self, decks: Decks | None) -> "Terms":
        """The same terms with other rate decks."""
        return Terms(
            self.tariff, self.stale, self.result_timeout_s, decks, self.coverage, self.persons
        )


@final
@mypyc_attr(acyclic=True)
class Charge:
    """What a leg costs: nanos, the row that said so, and the seconds that are paid for."""

    __slots__ = ("amount_nanos", "billed_s", "rate")

    def __init__(self, amount_nanos: int, rate: Rate, billed_s: int) -> None:
        self.amount_nanos = amount_nanos
        self.rate = rate
        self.billed_s = billed_s


@final
@mypyc_attr(acyclic=True)
class Exact:
    """A cost before it is rounded, as a fraction of the currency unit, with its row and what is
    billed of the call."""

    __slots__ = ("billed", "denominator", "numerator", "rate")

    def __init__(self, rate: Rate, billed: int, numerator: int, denominator: int) -> None:
        self.rate = rate
        self.billed = billed
        self.numerator = numerator
        self.denominator = denominator


@final
@mypyc_attr(acyclic=True)
class Burnt:
    """Grants after a movement, what each touched one gave (negative) or got, and the overdraft."""

    __slots__ = ("grants", "overdraft_nanos", "touched")

    def __init__(
        self,
        grants: tuple[Grant, ...],
        overdraft_nanos: int,
        touched: tuple[tuple[Grant, int], ...],
    ) -> None:
        self.grants = grants
        self.overdraft_nanos = overdraft_nanos
        self.touched = touched


@final
@mypyc_attr(acyclic=True)
class Refused:
    """The record is not booked: it goes to the dead letters, with the reason and the JSON path.
    `exposure_nanos` estimates what an unrated call may cost."""

    __slots__ = ("exposure_nanos", "path", "reason")

    def __init__(
        self, reason: DeadLetterReason, path: str = "", exposure_nanos: int | None = None
    ) -> None:
        self.reason = reason
        self.path = path
        self.exposure_nanos = exposure_nanos


@final
@mypyc_attr(acyclic=True)
class Outcome:
    """The new account and everything that was decided. `account` is the same object as before
    when nothing changed; `moved` is kind and nanos of every entry. `hold` is what became of the
    event's leg, None when nothing did."""

    __slots__ = (
        "account",
        "entries",
        "hold",
        "label",
        "moved",
        "notices",
        "payment",
        "refused",
        "requests",
        "withheld",
    )

    def __init__(
        self,
        account: Account | None,
        label: str,
        entries: tuple[bytes, ...] = (),
        moved: tuple[tuple[EntryKind, int], ...] = (),
        requests: tuple[RechargeRequest, ...] = (),
        notices: tuple[Notice, ...] = (),
        payment: Payment | None = None,
        refused: Refused | None = None,
        withheld: Withheld | None = None,
        hold: Hold | None = None,
    ) -> None:
        self.account = account
        self.label = label
        self.entries = entries
        self.moved = moved
        self.requests = requests
        self.notices = notices
        self.payment = payment
        self.refused = refused
        self.withheld = withheld
        self.hold = hold


@final
@mypyc_attr(acyclic=True)
class Ask:
    """Everything the guards of auto-recharge look at."""

    __slots__ = ("account", "available_nanos", "now", "policy", "stale")

    def __init__(
        self, account: Account, policy: Policy, available_nanos: int, now: datetime, stale: bool
    ) -> None:
        self.account = account
        self.policy = policy
        self.available_nanos = available_nanos
        self.now = now
        self.stale = stale


@final
@mypyc_attr(acyclic=True)
class Finding:
    """What a guard found when it was asked, and against which limit; amounts in nanos."""

    __slots__ = ("found", "holds", "limit")

    def __init__(self, holds: bool, found: object = None, limit: object = None) -> None:
        self.holds = holds
        self.found = found
        self.limit = limit
