"""Source records as events: what they say, what identifies them, and which are sound."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct
from xxhash import xxh3_64_intdigest

from schemas import topics
from streams.testbed.auditor.records import PLAIN, Place, Record, utc
from streams.testbed.auditor.shapes import TENANT, fits

_ID_MEMBER: Final = {
    topics.CALL_USAGE: "event_id",
    topics.CONFERENCE_USAGE: "event_id",
    topics.COMMAND: "command_id",
    topics.RESULT: "result_id",
}
# So long an id is remembered at least. Ids are forgotten by the week, a few days later.
REMEMBERED: Final = timedelta(days=35)
FORGOTTEN: Final = timedelta(days=43)
# Who asked, and when, may differ in a repeat.
_NOT_SAID: Final = {"command_id", "result_id", "source", "tenant_id", "issued_at", "issued_by"}


def kind_of(event: Mapping[str, Any]) -> str | None:
    """What was used, as the public call types say it."""
    call_type = event.get("call_type") or ""
    if call_type.startswith("dr_"):
        return "emergency" if call_type == "dr_emergency_out" else "free"
    number_type = str(event.get("number_type") or "").lower().replace("_", "").replace("-", "")
    toll_free = number_type == "tollfree"
    if event.get("kind"):
        return "toll_free_in" if toll_free and event["kind"] == "conf_dial_in" else event["kind"]
    per_minute = event.get("capability") == "MCOMEETACPEA"
    if call_type in ("user_in", "ucap_in"):
        return "toll_free_in" if toll_free else "free"
    if call_type == "conf_in":
        if toll_free:
            return "toll_free_in"
        return "conf_ppm" if per_minute else "conf_dial_in"
    if call_type == "conf_out":
        return "conf_ppm" if per_minute else "conf_dial_out"
    outgoing = ("user_out", "user_out_conf", "user_out_transfer", "user_out_forwarding", "ucap_out")
    if call_type in outgoing:
        if event.get("capability") == "MCOPSTNPP":
            return "payg_out"
        return "international" if event.get("capability") == "MCOPSTN2" else "overage_domestic"
    return None


def depends_on_country(event: Mapping[str, Any], kind: str | None) -> bool:
    """Whether a kind is a guess that the destination's country may overrule."""
    derived = not event.get("kind") and bool(event.get("user_country"))
    return derived and kind in ("international", "overage_domestic")


def kind_by(event: Mapping[str, Any], row: Mapping[str, str] | None) -> str | None:
    """What was used, once the row of the deck says where the call went."""
    kind, home_country = kind_of(event), event.get("user_country")
    country = (row or {}).get("Country")
    if not country or not depends_on_country(event, kind):
        return kind
    return "overage_domestic" if country == home_country else "international"


class Event(Struct, gc=False):
    """A source record that is an event, as the auditor understands it."""

    place: Place
    tenant: str
    source: str
    id: str
    body: dict[str, Any]

    @property
    def started(self) -> datetime:
        """When the leg began."""
        return utc(self.body["started_at"])

    @property
    def duration_s(self) -> int | None:
        """How long it took, if anything says so."""
        if self.body.get("duration_s") is not None:
            return int(self.body["duration_s"])
        if self.body.get("ended_at"):
            ended = datetime.fromisoformat(self.body["ended_at"])
            return (ended - self.started) // timedelta(seconds=1)
        return None

    @property
    def ended(self) -> datetime:
        """When it ended."""
        seconds = self.duration_s or 0
        try:
            counted = self.started + timedelta(seconds=seconds)
        except OverflowError:
            counted = datetime.max.replace(tzinfo=UTC)
        if self.body.get("ended_at"):
            ended = utc(self.body["ended_at"])
            if abs(ended - counted) <= timedelta(seconds=1):
                return ended
        return counted

    @property
    def corrected(self) -> tuple[str, str] | None:
        """The event that this one corrects, by source and id."""
        if self.body.get("phase") != "correction" or not self.body.get("corrects"):
            return None
        return self.source, str(self.body["corrects"])

    @property
    def at(self) -> datetime:
        """The instant by which it is too late or from the future."""
        if self.place[0] == topics.RESULT:
            return utc(self.body["occurred_at"])
        return self.ended

    def says(self) -> tuple[Any, ...]:
        """What matters for money, and whose it is: a repeat must say the same."""
        if self.place[0] not in topics.USAGE:
            kept = {name: value for name, value in self.body.items() if name not in _NOT_SAID}
            return (self.tenant, json.dumps(kept, sort_keys=True))
        names = (
            *("kind", "call_type", "number_type", "capability", "user_country", "callee"),
            *("currency", "corrects"),
        )
        texts = [str(self.body.get(name)) for name in names]
        return (self.tenant, *texts, self.body.get("phase") or "end", self.started, self.duration_s)


class Met:
    """The numbers of identities that were met, and on which day, in earlier audits too. They are
    kept for as long as a product may remember their ids: 35 days, to the end of a week."""

    def __init__(self, known: Mapping[str, Iterable[int]]) -> None:
        self._days = {
            number: date.fromisoformat(day) for day, numbers in known.items() for number in numbers
        }

    def __contains__(self, number: object) -> bool:
        """Whether it was met."""
        return number in self._days

    def within(self, number: int, at: datetime) -> bool:
        """Whether it was met so shortly before an instant that nobody can have forgotten it."""
        day = self._days.get(number)
        return day is not None and at.astimezone(UTC).date() - day < REMEMBERED

    def add(self, number: int, at: datetime) -> None:
        """It was met."""
        self._days[number] = at.astimezone(UTC).date()

    def checkpoint(self, now: datetime) -> dict[str, list[int]]:
        """What a later run needs to go on from here, by day."""
        kept: dict[str, list[int]] = {}
        for number, day in self._days.items():
            if now.astimezone(UTC).date() - day <= FORGOTTEN:
                kept.setdefault(day.isoformat(), []).append(number)
        return {day: sorted(numbers) for day, numbers in kept.items()}


def number_of(identity: tuple[str, str]) -> int:
    """A source and an id as one number, which is what checkpoints keep of them."""
    return xxh3_64_intdigest("\0".join(identity).encode())


def understand(record: Record, topic: str) -> Event | str:
    """The event a record holds, or the group of reasons for which it can hold none."""
    value = record.value
    if not value:
        return "malformed"
    headers = {name.lower(): content for name, content in record.headers}
    if len(value) > 5 and value[0] == 0 and value[5:6] == b"{":
        value = value[5:]
    try:
        body = PLAIN.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return "malformed"
    event_id = source = subject = None
    if headers.get("content-type", b"").lower().startswith(b"application/cloudevents+json"):
        if not isinstance(body, dict) or "data" not in body:
            return "malformed"
        event_id, source, subject = body.get("id"), body.get("source"), body.get("subject")
        body = body["data"]
    elif "ce_specversion" in headers:
        try:
            event_id = headers.get("ce_id", b"").decode()
            source = headers.get("ce_source", b"").decode()
            subject = headers["ce_subject"].decode() if "ce_subject" in headers else None
        except UnicodeDecodeError:
            return "malformed"
    if not isinstance(body, dict):
        return "malformed"
    event_id = event_id or body.get(_ID_MEMBER[topic])
    source = source or body.get("source") or topic
    tenant = subject or body.get("tenant_id")
    if record.key is None:
        return "key"
    key = record.key.decode(errors="replace")
    if tenant is not None and tenant != key:
        return "key"
    if not isinstance(event_id, str) or not event_id:
        return "malformed"
    place = (topic, record.partition, record.offset)
    return Event(place, key, str(source), event_id, body)


def is_sound(record: Record, event: Event) -> bool:
    """Whether a record is beyond doubt an event of its topic, envelope and all."""
    headers = {name.lower(): content for name, content in record.headers}
    outer: Mapping[str, Any] = {}
    if headers.get("content-type", b"").lower().startswith(b"application/cloudevents+json"):
        value = record.value or b""
        outer = PLAIN.decode(value[5:] if value[:1] == b"\0" else value)
        if not all(isinstance(outer.get(one), str) for one in ("specversion", "type")):
            return False
    elif "ce_specversion" in headers:
        try:
            outer = {
                name[3:]: headers[name].decode()
                for name in ("ce_id", "ce_source", "ce_subject")
                if name in headers
            }
        except UnicodeDecodeError:
            return False
    inner = (
        event.body.get(_ID_MEMBER[event.place[0]]),
        event.body.get("source"),
        event.body.get("tenant_id"),
    )
    if outer:
        said = (outer.get("id"), outer.get("source"), outer.get("subject"))
        if not all(isinstance(one, str) and one for one in said if one is not None):
            return False
        if said[0] is None or said[1] is None:
            return False
        if any(one not in (None, other) for one, other in zip(inner[:2], said[:2], strict=True)):
            return False
    elif "ce_specversion" in headers:
        return False
    texts = (event.id, event.source)
    return (
        all(len(one.encode()) <= 255 for one in texts)
        and inner[2] in (None, event.tenant)
        and TENANT.fullmatch(event.tenant) is not None
        and fits(event.place[0], event.body)
    )
