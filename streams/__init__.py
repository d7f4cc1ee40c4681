"""Credits: prepaid balances for telephony tenants, booked exactly once."""

from typing import Final

VERSION: Final = "0.1.0"
