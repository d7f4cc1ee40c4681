"""What an account's balance is the sum of."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streams.billing.account import Account


def balance_of(account: "Account") -> int:
    """What is left in the active grants, minus what was overdrawn, in nanos."""
    total = -account.overdraft_nanos
    for grant in account.grants:
        total += grant.left_nanos
    return total
