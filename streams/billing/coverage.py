"""Coverage: what kind of usage an event is; who pays for it says the coverage table.

The kinds and call types are those of Microsoft's published PSTN reports.
"""

from typing import Final

from schemas.usage import Kind
from streams.billing.events import UsageEvent

# What never costs unless a coverage table says otherwise. A finished toll-free call is charged
# whatever the balance (only admission looks at it).
FREE_KINDS: Final = frozenset({Kind.EMERGENCY, Kind.FREE, Kind.VOIP_LEG, Kind.CONF_DIAL_IN})
# Of a number that a deck has a row for as a whole.
_HIDDEN_DIGITS: Final = 4

_TOLL_FREE: Final = "toll_free"
_PAY_PER_MINUTE: Final = "MCOMEETACPEA"
_CREDITS: Final = "MCOPSTNPP"
_INTERNATIONAL_PLANS: Final = frozenset({"MCOPSTN2"})

_DIAL_IN: Final = Kind.CONF_DIAL_IN
_OUTGOING: Final = frozenset(
    {"user_out", "user_out_conf", "user_out_transfer", "user_out_forwarding", "ucap_out"}
)
_INCOMING: Final = frozenset({"user_in", "ucap_in"})


def kind_of(event: UsageEvent) -> Kind | None:
    """What was used: as the event says, else from call type, number type and capability.

    None when neither says it. Direct routing (`dr_…`) is the carrier's money and always free.
    """
    call_type = event.call_type
    if call_type is not None and call_type.startswith("dr_"):
        return Kind.EMERGENCY if call_type == "dr_emergency_out" else Kind.FREE
    kind = event.kind
    if kind is not None and (kind is not _DIAL_IN or event.number_type is None):
        return kind
    toll_free = event.number_type is not None and event.number_type.casefold() in (
        _TOLL_FREE,
        "tollfree",
        "toll-free",
    )
    if kind is not None:
        # Only an ordinary number makes dialling in free.
        return Kind.TOLL_FREE_IN if toll_free else kind
    if call_type in _INCOMING:
        return Kind.TOLL_FREE_IN if toll_free else Kind.FREE
    if call_type == "conf_in":
        if toll_free:
            return Kind.TOLL_FREE_IN
        return Kind.CONF_PPM if event.capability == _PAY_PER_MINUTE else Kind.CONF_DIAL_IN
    if call_type == "conf_out":
        return Kind.CONF_PPM if event.capability == _PAY_PER_MINUTE else Kind.CONF_DIAL_OUT
    if call_type in _OUTGOING:
        if event.capability == _CREDITS:
            return Kind.PAYG_OUT
        if event.capability in _INTERNATIONAL_PLANS:
            return Kind.INTERNATIONAL
        return Kind.OVERAGE_DOMESTIC
    return None


def depends_on_country(event: UsageEvent, kind: Kind) -> bool:
    """Whether a kind that was derived from the call type is only a guess by the user's plan: a call
    is international or domestic by the country it goes to."""
    return (
        event.kind is None
        and event.user_country is not None
        and (kind is Kind.INTERNATIONAL or kind is Kind.OVERAGE_DOMESTIC)
    )


def towards(event: UsageEvent, kind: Kind, country: str) -> Kind:
    """The kind of such a call to a country; the guess where the deck's row names none."""
    if not country:
        return kind
    return Kind.OVERAGE_DOMESTIC if country == event.user_country else Kind.INTERNATIONAL


def digits_of(number: str | None) -> str | None:
    """The digits of an E.164 number: a plus and up to 15 of them, the first no 0. None when it
    is no such number."""
    if number is None or number[:1] != "+":
        return None
    digits = number[1:]
    if not digits.isdigit() or not digits.isascii() or digits[0] == "0":
        return None
    return digits if 2 <= len(digits) <= 15 else None


def shown_prefix(prefix: str, digits: str) -> str:
    """The matched prefix as books may keep it: one that is the whole number loses its end."""
    if len(prefix) < len(digits):
        return prefix
    return prefix[:-_HIDDEN_DIGITS].ljust(len(prefix), "x")


def masked(prefix: str, digits: str) -> str:
    """A number that can be shown: the matched prefix, the rest as x. Numbers are personal data."""
    return f"+{shown_prefix(prefix, digits)}{'x' * (len(digits) - len(prefix))}"
