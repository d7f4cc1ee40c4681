"""Usage events: a call leg or a conference stay that happened (or is happening).

The data of `telephony.call.usage.v1` and `telephony.conference.usage.v1`. Unknown members are
accepted and counted; a known member of the wrong shape is a dead letter.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from schemas.money import Amount, Currency

Id = Annotated[str, Meta(min_length=1, max_length=255)]
TenantId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,64}$(?!\n)", examples=["contoso"])]
Timestamp = Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset")]
# No call lasts longer; a larger number is a counter in the wrong unit.
Seconds = Annotated[int, Meta(ge=0, le=31 * 86_400)]
Country = Annotated[str, Meta(pattern=r"^[A-Z]{2}$(?!\n)", description="ISO 3166-1 alpha-2")]
Text = Annotated[str, Meta(max_length=255)]


class Kind(StrEnum):
    """What was used; decides who pays (coverage)."""

    TOLL_FREE_IN = "toll_free_in"
    CONF_DIAL_OUT = "conf_dial_out"
    CONF_DIAL_IN = "conf_dial_in"
    INTERNATIONAL = "international"
    OVERAGE_DOMESTIC = "overage_domestic"
    PAYG_OUT = "payg_out"
    CONF_PPM = "conf_ppm"
    VOIP_LEG = "voip_leg"
    FREE = "free"
    EMERGENCY = "emergency"


class Phase(StrEnum):
    """Where the leg is in its life. Only `end` and `correction` move money."""

    START = "start"
    PROGRESS = "progress"
    END = "end"
    CORRECTION = "correction"


class Usage(Struct, kw_only=True, frozen=True, gc=False):
    """What both kinds of usage event carry.

    `event_id`, `source` and `tenant_id` may be absent where a CloudEvents envelope carries
    `id`, `source` and `subject`; where both are there they must agree. `duration_s` is whole
    seconds and wins over the times when they disagree by more than a second.
    """

    event_id: Id | None = None
    source: Id | None = None
    tenant_id: TenantId | None = None
    kind: Kind | None = None
    call_type: Text | None = None
    number_type: Text | None = None
    capability: Text | None = None
    phase: Phase = Phase.END
    call_id: Id
    leg_id: Id | None = None
    conference_id: Id | None = None
    organizer_id: Id | None = None
    user_id: Id | None = None
    user_country: Country | None = None
    caller: Text | None = None
    callee: Text | None = None
    started_at: Timestamp
    ended_at: Timestamp | None = None
    duration_s: Seconds | None = None
    upstream_charge: Amount | None = None
    currency: Currency | None = None
    corrects: Id | None = None


class CallUsage(Usage, kw_only=True, frozen=True, gc=False):
    """A leg of a call."""


class ConferenceUsage(Usage, kw_only=True, frozen=True, gc=False):
    """A stay in a conference: dial-in, dial-out or VoIP leg. The organizer's tenant pays."""

    conference_id: Id
