"""The coverage table: who pays for which kind of usage, as configuration."""

import pytest

from schemas.usage import Kind
from streams.billing import alerts, coverage
from streams.billing.coverage_table import Coverage, CoverageError, Reach, parse_coverage
from streams.coverage import coverage_bytes, load_coverage
from tests.billing.builders import a_call, an_account, apply

TEXT = coverage_bytes(None).decode()
TABLE = load_coverage(None)


def changed(old: str, new: str) -> Coverage:
    assert old in TEXT
    return parse_coverage(TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        (Kind.EMERGENCY, ("free",)),
        (Kind.FREE, ("free",)),
        (Kind.VOIP_LEG, ("free",)),
        (Kind.CONF_DIAL_IN, ("free",)),
        (Kind.TOLL_FREE_IN, ("credits",)),
        (Kind.CONF_DIAL_OUT, ("conference", "credits")),
        (Kind.INTERNATIONAL, ("international", "credits")),
        (Kind.OVERAGE_DOMESTIC, ("domestic", "credits")),
        (Kind.PAYG_OUT, ("credits",)),
        (Kind.CONF_PPM, ("credits",)),
    ],
)
def test_the_packaged_table_says_who_pays(kind: Kind, sources: tuple[str, ...]) -> None:
    assert TABLE.sources[kind] == sources


def test_without_a_table_the_same_kinds_are_free() -> None:
    assert TABLE.free == coverage.FREE_KINDS
    assert TABLE.sources.keys() == set(Kind)


def test_zone_a_has_44_countries_and_no_premium_numbers() -> None:
    zone_a = TABLE.reaches["conference"]
    assert zone_a.countries is not None
    assert len(zone_a.countries) == 44
    assert zone_a.covers("GB", "mobile")
    assert not zone_a.covers("GB", "premium")
    assert not zone_a.covers("ME", "mobile")
    assert Reach().covers("ME", "premium")


@pytest.mark.parametrize(
    ("plan", "pool", "country", "minutes"),
    [
        ("MCOMEETADV", "conference", None, 60),
        ("MCOPSTN1", "domestic", "US", 3_000),
        ("MCOPSTN1", "domestic", "FR", 1_200),
        ("MCOPSTN1", "domestic", "BR", 0),
        ("MCOPSTN1", "international", "US", 0),
        ("MCOPSTN2", "domestic", "GB", 1_200),
        ("MCOPSTN2", "international", "GB", 600),
        ("MCOPSTN5", "domestic", "US", 120),
        ("MCOPSTN6", "domestic", "JP", 240),
    ],
)
def test_a_licence_includes_minutes_by_plan_and_country(
    plan: str, pool: str, country: str | None, minutes: int
) -> None:
    assert TABLE.plans[plan].minutes_of(pool, country) == minutes


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('conf_ppm = ["credits"]', 'conf_pmp = ["credits"]', "conf_pmp is no kind of usage"),
        ('conf_ppm = ["credits"]', "", "sources.conf_ppm is missing"),
        ('conf_ppm = ["credits"]', 'conf_ppm = ["cash"]', "'cash' is no source; known are free"),
        ('conf_ppm = ["credits"]', 'conf_ppm = ["domestic"]', "must end in free or credits"),
        ('conf_ppm = ["credits"]', "conf_ppm = []", "must end in free or credits"),
        ('conf_ppm = ["credits"]', 'conf_ppm = "credits"', "must be a list of texts"),
        ('conf_ppm = ["credits"]', 'conf_ppm = ["free", "credits"]', "name neither before"),
        ('conf_ppm = ["credits"]', 'conf_ppm = ["domestic", "free"]', "takes no minutes"),
        (
            'conf_ppm = ["credits"]',
            'conf_ppm = ["domestic", "domestic", "credits"]',
            "names a source twice",
        ),
        ('emergency = ["free"]', 'emergency = ["credits"]', "sources.emergency must be free"),
        ("conference = 60", "conferences = 60", "plans.MCOMEETADV.conferences is no pool"),
        ("conference = 60", "conference = 0", "0 is no number of minutes"),
        ("conference = 60", 'conference = "60"', "'60' is no number of minutes"),
        ("conference = 60", "", "plans.MCOMEETADV must have pools"),
        ("domestic = { US = 3000, ", "domestic = { usa = 3000, ", "neither a country nor"),
        ('not_types = ["premium"]', 'types = ["premium"]', "pools.conference.types is unknown"),
        ('coupled = ["GB"]', 'coupled = ["uk"]', "'uk' is no country"),
        ("[sources]", "[source]", "'source' is no table"),
        ("[sources]", "[sources", "it is no TOML"),
        ("[pools.domestic]", "[pools.Domestic]", "a pool's name"),
    ],
)
def test_a_fault_in_a_table_is_named(old: str, new: str, fault: str) -> None:
    with pytest.raises(CoverageError) as caught:
        changed(old, new)
    assert any(fault in one for one in caught.value.faults), caught.value.faults


def test_a_countrys_own_minutes_go_before_those_of_its_region() -> None:
    table = changed("US = 3000, EU = 1200", "GB = 7, EU = 1200")
    assert table.plans["MCOPSTN1"].minutes_of("domestic", "GB") == 7


def test_what_a_table_says_is_what_is_charged() -> None:
    call = a_call(kind=Kind.CONF_DIAL_IN)
    assert apply(an_account("5"), call).label == "free"
    paid = changed('conf_dial_in = ["free"]', 'conf_dial_in = ["credits"]')
    assert apply(an_account("5"), call, coverage=paid).label == "charged"


def test_what_a_table_makes_free_is_never_suspended_for_money() -> None:
    table = changed('toll_free_in = ["credits"]', 'toll_free_in = ["free"]')
    outcome = apply(an_account("1"), a_call(), coverage=table)
    scopes = [kind for notice in outcome.notices for kind in notice.scopes]
    assert Kind.INTERNATIONAL in scopes
    assert Kind.TOLL_FREE_IN not in scopes
    assert alerts.kinds_of(1, table.free) == []
