"""What the core's functions answer with: values, without behaviour."""

from datetime import datetime

from msgspec import Struct

from schemas.funding import RechargeRequest
from schemas.ledger import EntryKind
from schemas.notices import DeadLetterReason, Notice, Withheld
from streams.billing.account import Account, Grant, Hold, Payment, Policy
from streams.billing.coverage import FREE_KINDS
from streams.billing.coverage_table import Coverage, without_pools
from streams.billing.tariff import Decks, Rate, Tariff


class Terms(Struct, frozen=True, gc=False):
    """What is in force for an event: the tariff of `CREDITS_DECK`, whether the balance may be
    stale (the shard is behind), how long a recharge request waits for its answer, once any are
    published, the rate decks by name and time, and who pays for which kind of usage."""

    tariff: Tariff
    stale: bool = False
    result_timeout_s: int = 900
    decks: Decks | None = None
    coverage: Coverage = without_pools(FREE_KINDS)


class Charge(Struct, frozen=True, gc=False):
    """What a leg costs: nanos, the row that said so, and the seconds that are paid for."""

    amount_nanos: int
    rate: Rate
    billed_s: int


class Exact(Struct, frozen=True, gc=False):
    """A cost before it is rounded, as a fraction of the currency unit, with its row and what is
    billed of the call."""

    rate: Rate
    billed: int
    numerator: int
    denominator: int


class Burnt(Struct, frozen=True, gc=False):
    """Grants after a movement, what each touched one gave (negative) or got, and the overdraft."""

    grants: tuple[Grant, ...]
    overdraft_nanos: int
    touched: tuple[tuple[Grant, int], ...]


class Refused(Struct, frozen=True, gc=False):
    """The record is not booked: it goes to the dead letters, with the reason and the JSON path.
    `exposure_nanos` estimates what an unrated call may cost."""

    reason: DeadLetterReason
    path: str = ""
    exposure_nanos: int | None = None


class Outcome(Struct, frozen=True, gc=False):
    """The new account and everything that was decided. `account` is the same object as before
    when nothing changed; `moved` is kind and nanos of every entry. `hold` is what became of the
    event's leg, None when nothing did."""

    account: Account | None
    label: str
    entries: tuple[bytes, ...] = ()
    moved: tuple[tuple[EntryKind, int], ...] = ()
    requests: tuple[RechargeRequest, ...] = ()
    notices: tuple[Notice, ...] = ()
    payment: Payment | None = None
    refused: Refused | None = None
    withheld: Withheld | None = None
    hold: Hold | None = None


class Ask(Struct, frozen=True, gc=False):
    """Everything the guards of auto-recharge look at."""

    account: Account
    policy: Policy
    available_nanos: int
    now: datetime
    stale: bool


class Finding(Struct, frozen=True, gc=False):
    """What a guard found when it was asked, and against which limit; amounts in nanos."""

    holds: bool
    found: object = None
    limit: object = None
