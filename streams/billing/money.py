"""Money inside: integers of 10⁻⁹ of the currency unit ("nanos"), rounded in named places only."""

from typing import Final

from schemas.nanos import NANOS

# A balance beyond this would not fit a signed 64-bit row with room for one more event.
MAX_BALANCE_NANOS: Final = 9_000_000_000 * NANOS

# ISO 4217: decimals of the minor unit where it is not two.
_EXPONENTS: Final = {
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(
        ("BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF").split(),
        0,
    ),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
CURRENCIES: Final = frozenset(
    (
        "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN "
        "BZD CAD CDF CHF CLF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP "
        "GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES "
        "KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU "
        "MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON "
        "RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND "
        "TOP TRY TTD TWD TZS UAH UGX USD UYI UYU UYW UZS VED VES VND VUV WST XAF XCD XOF XPF YER "
        "ZAR ZMW ZWG"
    ).split()
)


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide, rounding up: started increments are paid in full."""
    assert denominator > 0
    return -(-numerator // denominator)


def exponent_of(currency: str) -> int:
    """Decimals of a currency's minor unit (ISO 4217): JPY 0, USD 2, KWD 3."""
    return _EXPONENTS.get(currency, 2)


def minor_from(nanos: int, currency: str) -> int:
    """The amount in minor units, rounded up: we never ask for less than is needed."""
    return ceil_div(nanos, 10 ** (9 - exponent_of(currency)))


def rounded_up(nanos: int, currency: str) -> int:
    """The amount in nanos, rounded up to whole minor units."""
    unit_nanos: int = 10 ** (9 - exponent_of(currency))
    return ceil_div(nanos, unit_nanos) * unit_nanos
