"""What a shard keeps in mind of its tenants' recharges, so that no row is decoded to be asked."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from schemas.notices import Withheld
from streams.billing.account import Account
from streams.billing.stages import Stage
from streams.engine.rows import owner_of

# Rows of interest hold one of these words; others need not be decoded on opening.
_WORDS: Final = (Stage.REQUESTED.value.encode(), Withheld.STALE.value.encode())


class Unanswered:
    """Auto-recharges in flight, and tenants whose recharge was withheld for a stale balance."""

    def __init__(self) -> None:
        self.stale: set[bytes] = set()
        self._asked: dict[bytes, tuple[str, datetime]] = {}

    @classmethod
    def of(
        cls, rows: Mapping[bytes, bytes], decode: Callable[[bytes, bytes], Account]
    ) -> "Unanswered":
        """What the rows of a partition say."""
        found = cls()
        for key, value in rows.items():
            if any(word in value for word in _WORDS) and not owner_of(key)[1]:
                found.follow(key, decode(key, value))
        return found

    def follow(self, key: bytes, account: Account) -> datetime | None:
        """Take an account as it is now. When the request that was in flight has been answered:
        the instant it was made."""
        recharging = account.standing.recharging
        if recharging.withheld is Withheld.STALE:
            self.stale.add(key)
        else:
            self.stale.discard(key)
        before = self._asked.get(key)
        asked = recharging.asked
        if asked is None or account.state != Stage.REQUESTED:
            self._asked.pop(key, None)
        else:
            self._asked[key] = (asked.recharge_id, asked.requested_at)
        if before is None or (asked is not None and asked.recharge_id == before[0]):
            return None
        return before[1]

    def oldest_age(self, now: datetime) -> timedelta:
        """For how long the oldest request in flight has waited; nothing when there is none."""
        oldest = min((requested_at for _, requested_at in self._asked.values()), default=now)
        return max(timedelta(), now - oldest)
