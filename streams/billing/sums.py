"""What an account comes to: its balance, its state. Here, for an account's own methods are not
compiled."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streams.billing.account import Account


def balance_of(account: "Account") -> int:
    """What is left in the active grants, minus what was overdrawn, in nanos."""
    total = -account.overdraft_nanos
    for grant in account.grants:
        total += grant.left_nanos
    return total


def state_of(account: "Account") -> str:
    """The label of `credits_tenants`: the recharge stage, or closed."""
    return account.recharging.stage if account.closed_at is None else "closed"
