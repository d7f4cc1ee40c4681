"""Deciding a batch: from records to everything that one transaction will write.

Nothing here waits and nothing here remembers: what a batch decides stands in its `Work`, and the
shard makes it true once it is committed. This is the worker's hot path; what looks pedestrian in
it (no generators, no helper for two lines) is so because it was measured.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import msgspec

from schemas import topics
from schemas.codec import Decoded, decoder
from schemas.commands import BookPayment, ResolveRecharge
from schemas.envelope import (
    CAUSED_BY,
    MOVED_FROM,
    TRACE_HEADERS,
    Headers,
    RejectedError,
    binary_headers,
    common_headers,
)
from schemas.funding import RechargeResult
from schemas.ledger import EntryKind
from schemas.nanos import text_from
from schemas.notices import DeadLetterReason, Notice, NoticeKind
from schemas.topics import Names
from schemas.usage import CallUsage, ConferenceUsage, Phase
from streams import VERSION
from streams.billing import holds, ledger
from streams.billing.account import (
    Account,
    NewerRowError,
    decode_hold,
    decode_payment,
    decode_row,
    encode_hold,
    encode_payment,
    encode_row,
)
from streams.billing.charging import FUTURE
from streams.billing.events import (
    Cause,
    CommandEvent,
    Event,
    ResultEvent,
    Tick,
    UsageEvent,
)
from streams.billing.legs import usage_event
from streams.billing.outcomes import Outcome
from streams.billing.parts import Payment, microseconds
from streams.billing.recharge import decline_class
from streams.engine import identity, seen
from streams.engine.errors import Stop, StoppedError
from streams.engine.identity import EPOCH
from streams.engine.position import SeenMark, SourcePosition, encode_position, marked
from streams.engine.reader import Slice
from streams.engine.record_batch import (
    encode_each,
    encode_headers,
    header,
    header_name,
    varint,
)
from streams.engine.restore import record_hash
from streams.engine.rows import (
    PAYMENT_MARK,
    POSITION_KEY,
    hold_key,
    home_of,
    owner_of,
    payment_key,
)
from streams.engine.work import Candidate, Fate, Skipped, Work
from streams.settings import Settings

# One account's ticks at one instant: more means that its due time does not move.
MOST_TICKS_OF_ONE: Final = 100
# Decoded accounts cost ten times their rows' bytes, and most of those once more (`Standing.tail`);
# to decode one costs as much as to price several calls.
MOST_RECENT: Final = 3_000
DEFECT_RETRY_US: Final = 3_600_000_000
# What a moved record's header and the broker's own framing may add to it.
MOVED_HEADROOM_BYTES: Final = 512

T = TypeVar("T")

_encode: Final = msgspec.json.Encoder().encode
_CE_ID: Final = header_name("ce_id")
_CAUSED_BY: Final = header_name(CAUSED_BY)
_MICROSECOND: Final = timedelta(microseconds=1)
_CHARGE: Final = EntryKind.CHARGE
_CORRECTION: Final = Phase.CORRECTION
_END: Final = Phase.END
WRONG_PARTITION: Final = DeadLetterReason.WRONG_PARTITION


def instant_from(us: int) -> datetime:
    """µs since 1970 as an instant."""
    return EPOCH + timedelta(microseconds=us)


class DefectError(Exception):
    """The core raised, on a record or on a tenant's tick. The batch must be decided again, and
    `skip` tells it what to leave out."""

    def __init__(self, cause: Exception, at: tuple[str, int] | bytes) -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause
        self._at = at

    @property
    def place(self) -> str:
        """Where it happened, in one word: topic and offset, or the tenant whose tick it was."""
        if isinstance(self._at, bytes):
            return f"tick/{self._at.decode()}"
        topic, offset = self._at
        return f"{topic}/{offset}"

    def skip(self, skipped: Skipped) -> None:
        """Leave out what raised."""
        if isinstance(self._at, bytes):
            skipped.ticks.add(self._at)
        else:
            skipped.records.add(self._at)


class Decider:
    """Decides the batches of one partition, against the rows its shard holds in memory."""

    def __init__(self, settings: Settings, partition: int) -> None:
        self.rows: dict[bytes, bytes] = {}
        # Accounts that committed batches have touched, decoded already: the latest ones, and those
        # before them.
        self.recent: dict[bytes, Account] = {}
        self.earlier: dict[bytes, Account] = {}
        self._partition = partition
        self._partitions = settings.partitions
        self._names: Names = settings.topics
        self._app_id = settings.app_id
        self._decoders = {name: decoder(name) for name in topics.SOURCES}
        self._ledger_topic = self._names.of(topics.LEDGER)
        self._balance_topic = self._names.of(topics.BALANCE)
        self._changelog_topic = self._names.of(topics.CHANGELOG)
        # What is the same in all entries; the id, the cause and what is traced come behind it.
        common = common_headers(topics.LEDGER, source=settings.app_id)
        self._entry_headers = encode_each(common)
        self._entry_number = len(common) + 2
        # What is the same in all balances; the id comes behind it.
        common = common_headers(topics.BALANCE, source=settings.app_id)
        self._balance_headers = varint(len(common) + 1) + encode_each(common)
        # What is the same in all notices; the id and the cause come behind it.
        common = common_headers(topics.NOTIFICATION, source=settings.app_id)
        self._notice_headers = varint(len(common) + 2) + encode_each(common)
        self._notification_topic = self._names.of(topics.NOTIFICATION)

    def remember(self, work: Work) -> None:
        """A batch is committed: keep its accounts decoded, each as its row has it now, and let go
        of those that no batch has touched for long."""
        self.recent.update(work.accounts)
        if len(self.recent) > MOST_RECENT:
            self.earlier, self.recent = self.recent, {}

    # -- reading -----------------------------------------------------------------------------

    def read(
        self, work: Work, topic: str, records: Sequence[Any], first: int, skipped: Skipped
    ) -> tuple[list[Candidate], list[Fate]]:
        """Decode every record from offset `first` on; those that are no event of ours get their
        fate. `topic` is the name in the manifest. Raises DefectError."""
        rows = self.rows
        partition = self._partition
        decoder = self._decoders[topic]
        # What the topic says need not be asked of every event: that costs as much as to copy it.
        of_usage = topic in topics.USAGE
        candidates: list[Candidate] = []
        fates: list[Fate] = []
        punctuality = ledger.Punctuality(work.now)
        for record in records:
            offset = record.offset
            if offset < first:
                continue
            key = record.key
            # A row of this partition proves that the key belongs here, and that it is a
            # tenant's name; hashing costs more.
            known = key in rows
            if not known and key is not None:
                target = home_of(key, self._partitions)
                if target != partition:
                    work.tally.add("credits_wrong_partition_total", topic)
                    # A command's answer is awaited where its key belongs, so it is not moved.
                    reason = WRONG_PARTITION if topic == topics.COMMAND else None
                    fates.append(Fate(record, len(candidates), reason, target=target))
                    continue
            try:
                decoded = decoder.decode(key, record.value, record.headers, known)
            except RejectedError as error:
                fates.append(Fate(record, len(candidates), error.reason, error.path))
                continue
            if skipped.records and (topic, offset) in skipped.records:
                fates.append(Fate(record, len(candidates), DeadLetterReason.DEFECT))
                continue
            if decoded.unknown_fields:
                work.tally.add("credits_unknown_fields_total", topic)
            source, event_id = decoded.source, decoded.id
            cause = Cause(topic, partition, offset, source, event_id)
            try:
                if of_usage:
                    data: Any = decoded.event
                    usage = usage_event(data, cause)
                    if usage.phase is _CORRECTION:
                        work.corrects = True
                    event: Event = usage
                else:
                    event = _funding_event(decoded, cause)
                late = punctuality.judge(event)
                check = identity.check_of(ledger.content(event), key)
            except Exception as error:
                # A record that breaks us is one dead letter, not a worker that never starts.
                raise DefectError(error, (topic, offset)) from error
            if late is not None:
                fates.append(Fate(record, len(candidates), late))
                continue
            fingerprint = identity.fingerprint(source, event_id)
            candidates.append(Candidate(record, event, fingerprint, check))
        return candidates, fates

    # -- applying ----------------------------------------------------------------------------

    def tick(
        self,
        work: Work,
        due_rows: Sequence[tuple[int, bytes]],
        caught_up: Sequence[bytes],
        skipped: Skipped,
    ) -> None:
        """Everything that is due at or before `now` goes before the batch's events; so does what
        was withheld for a stale balance, once the shard has caught up.

        Raises DefectError, StoppedError.
        """
        now_us = microseconds(work.now)
        for due, key in due_rows:
            owner, mark = owner_of(key)
            if mark == PAYMENT_MARK:
                work.rows[key] = None
                continue
            if owner in skipped.ticks:
                # Looked at again in an hour; the row itself stays as it was.
                work.tally.add("credits_events_total", "tick", "rejected")
                value = self.rows[key]
                work.rows[key] = (now_us + DEFECT_RETRY_US).to_bytes(8, "big") + value[8:]
                continue
            if mark:
                hold = self._decoded(decode_hold, key, self.rows[key])
                if not hold.ended:
                    self._tick_one(work, owner, Tick(instant_from(due), hold))
                work.rows[key] = None
                continue
            for _ in range(MOST_TICKS_OF_ONE):
                following = self._tick_one(work, key, Tick(instant_from(due))).next_due()
                if following is None or microseconds(following) > now_us:
                    break
                due = microseconds(following)
        work.caught_up = list(caught_up)
        for key in caught_up:
            if key not in skipped.ticks:
                self._tick_one(work, key, Tick(work.now))

    def _tick_one(self, work: Work, key: bytes, tick: Tick) -> Account:
        account = self._account(work, key)
        assert account is not None
        try:
            outcome = ledger.apply(account, tick, work.terms, work.now)
        except StoppedError:
            raise
        except Exception as error:
            raise DefectError(error, key) from error
        self._announce(work, key, outcome, tick.cause, ())
        work.tally.add("credits_events_total", "tick", outcome.label)
        return work.accounts[key]

    def apply(
        self,
        work: Work,
        topic: str,
        candidates: Sequence[Candidate],
        fates: Sequence[Fate],
        known: dict[int, int],
    ) -> None:
        """Apply candidates and fates in the order of their records. `known` are the checks of
        ids that are remembered, by place. Raises DefectError, StoppedError."""
        first = 0
        for fate in fates:
            if fate.place > first:
                self._apply(work, topic, candidates, range(first, fate.place), known)
                first = fate.place
            if fate.reason is None:
                self._move(work, topic, fate)
            else:
                self._bury(work, topic, fate.record, fate.reason, fate.path)
        self._apply(work, topic, candidates, range(first, len(candidates)), known)

    def _apply(
        self,
        work: Work,
        topic: str,
        candidates: Sequence[Candidate],
        places: range,
        known: dict[int, int],
    ) -> None:
        fresh, weeks, accounts = work.fresh, work.weeks, work.accounts
        terms, now = work.terms, work.now
        corrects = work.corrects
        this_week = identity.week_of(work.now)
        outcomes: dict[str, int] = {}
        for at in places:
            candidate = candidates[at]
            record = candidate.record
            fingerprint = candidate.fingerprint
            earlier = known.get(at)
            if earlier is None:
                earlier = fresh.get(fingerprint)
            if earlier is not None:
                label = self._repeat(work, topic, candidate, conflict=earlier != candidate.check)
            else:
                key = record.key
                event = candidate.event
                leg = ""
                try:
                    account = accounts.get(key)
                    if account is None:
                        account = self._account(work, key)
                    # Usage is remembered under the week it ended in, all else under this one.
                    if isinstance(event, UsageEvent):
                        week = identity.week_of(event.ended_at)
                        # An end without a leg id, of a tenant without open calls, ends none.
                        if account is not None and (
                            account.standing.holds
                            or event.leg_id is not None
                            or event.phase is not _END
                        ):
                            event = self._with_hold(work, event, key)
                            leg = event.leg
                        if corrects and event.phase is _CORRECTION:
                            event = _with_original(work, event)
                    else:
                        week = this_week
                        event = self._with_payment(work, event, key)
                    outcome = ledger.apply(account, event, terms, now)
                except StoppedError:
                    raise
                except Exception as error:
                    raise DefectError(error, (topic, record.offset)) from error
                label = outcome.label
                if outcome.refused is not None:
                    refused = outcome.refused
                    self._bury(
                        work, topic, record, refused.reason, refused.path, refused.exposure_nanos
                    )
                else:
                    fresh[fingerprint] = candidate.check
                    weeks.append(week)
                    if corrects and isinstance(event, UsageEvent) and event.original is not None:
                        _remember_corrected(work, event)
                if leg and outcome.hold is not None:
                    work.holds[hold_key(key, leg)] = outcome.hold
                # Free usage changes nothing and tells nothing; a refused command must be told.
                if outcome.account is not account or outcome.notices:
                    self._announce(work, key, outcome, event.cause, record.headers)
                if isinstance(event, ResultEvent):
                    status, code = event.result.status, event.result.decline_code
                    work.tally.add(
                        "credits_recharge_results_total", status.value, decline_class(status, code)
                    )
            outcomes[label] = outcomes.get(label, 0) + 1
        for label, count in outcomes.items():
            work.tally.add("credits_events_total", topic, label, by=count)

    def _account(self, work: Work, key: bytes) -> Account | None:
        account = work.accounts.get(key)
        if account is None:
            value = self.rows.get(key)
            if value is None:
                return None
            account = self.recent.get(key)
            if account is None:
                account = self.earlier.get(key)
                if account is None:
                    account = self.account_of(key, value)
            work.accounts[key] = account
            work.before[key] = account
        return account

    def account_of(self, key: bytes, value: bytes) -> Account:
        """The account that a tenant's row holds. Raises StoppedError."""
        return self._decoded(decode_row, key, value)

    def _decoded(self, decode: Callable[[bytes], T], key: bytes, value: bytes) -> T:
        """A row of ours. One that cannot be read is no event's fault: the shard stops."""
        name = key.partition(b"\0")[0].decode()
        try:
            return decode(value)
        except NewerRowError as error:
            raise StoppedError(Stop.NEWER_ROWS, f"the row of {name}: {error}") from None
        except msgspec.DecodeError as error:
            raise StoppedError(
                Stop.STATE_LOST, f"the row of {name} cannot be read: {error}"
            ) from None

    def _with_payment(self, work: Work, event: Event, key: bytes) -> Event:
        """What an event touches enters with it."""
        match event:
            case ResultEvent(result=result, cause=cause):
                return ResultEvent(result, cause, self._payment(work, key, result.payment_id))
            case CommandEvent(command=BookPayment() | ResolveRecharge() as command, cause=cause):
                payment_id = command.payment_id
                payment = None if payment_id is None else self._payment(work, key, payment_id)
                return CommandEvent(command, cause, payment)
            case _:
                return event

    def _payment(self, work: Work, tenant: bytes, payment_id: str) -> Payment | None:
        key = payment_key(tenant.decode(), payment_id)
        payment = work.payments.get(key)
        if payment is None:
            value = self.rows.get(key)
            payment = None if value is None else self._decoded(decode_payment, key, value)
        return payment

    def _with_hold(self, work: Work, event: UsageEvent, tenant: bytes) -> UsageEvent:
        leg = holds.leg_of(event)
        key = hold_key(tenant, leg)
        hold = work.holds.get(key)
        if hold is None:
            # A tick of this batch may have ended it already.
            value = work.rows[key] if key in work.rows else self.rows.get(key)
            hold = None if value is None else self._decoded(decode_hold, key, value)
        return event.about(leg, hold)

    # -- announcing --------------------------------------------------------------------------

    def _announce(
        self, work: Work, key: bytes, outcome: Outcome, cause: Cause, headers: Headers
    ) -> None:
        """Keep the new account and add what there is to tell to the batch's outputs."""
        account = outcome.account
        caused_by = f"{cause.source}/{cause.id}"
        traced = [header for header in headers if header[0] in TRACE_HEADERS] if headers else []
        if account is not None:
            if key not in work.before:
                work.before[key] = None
            work.accounts[key] = account
            entries = outcome.entries
            if entries:
                number = varint(self._entry_number + len(traced))
                told = header(_CAUSED_BY, caused_by.encode())
                further = encode_each(traced) if traced else b""
                seq = account.seq - len(entries)
                for entry in entries:
                    seq += 1
                    entry_id = header(_CE_ID, b"%b/%d" % (key, seq))
                    work.outputs.append(
                        self._ledger_topic,
                        self._partition,
                        key,
                        entry,
                        b"%b%b%b%b%b" % (number, self._entry_headers, entry_id, told, further),
                    )
                currency = account.currency
                booked, charged = work.tally.booked_nanos, work.tally.charged_nanos
                for kind, nanos in outcome.moved:
                    booked[currency] = booked.get(currency, 0) + nanos
                    if kind is _CHARGE:
                        charged[currency] = charged.get(currency, 0) - nanos
        if outcome.payment is not None:
            payment = outcome.payment
            work.payments[payment_key(key.decode(), payment.payment_id)] = payment
        for request in outcome.requests:
            stamp = microseconds(request.expires_at)
            work.outputs.append(
                self._names.of(topics.REQUESTED),
                self._partition,
                key,
                _encode(request),
                encode_headers(
                    [
                        *binary_headers(
                            topics.REQUESTED,
                            source=self._app_id,
                            event_id=f"{request.recharge_id}/{stamp}",
                            caused_by=caused_by,
                        ),
                        *traced,
                    ]
                ),
            )
            work.tally.add("credits_recharge_requests_total", request.reason.value)
        for notice in outcome.notices:
            self._notify(work, key, notice, cause)
        if outcome.withheld is not None:
            work.tally.add("credits_recharges_withheld_total", outcome.withheld.value)

    def _notify(self, work: Work, key: bytes, notice: Notice, cause: Cause) -> None:
        work.notices += 1
        place = f"{cause.topic}/{cause.partition}/{cause.offset}"
        if cause.topic == "tick":
            place = f"tick/{cause.id}"
        notice_id = f"{notice.tenant_id}/{place}/{work.notices}"
        work.outputs.append(
            self._notification_topic,
            self._partition,
            key,
            _encode(notice),
            b"%b%b%b"
            % (
                self._notice_headers,
                header(_CE_ID, notice_id.encode()),
                header(_CAUSED_BY, f"{cause.source}/{cause.id}".encode()),
            ),
        )

    def _repeat(self, work: Work, topic: str, candidate: Candidate, *, conflict: bool) -> str:
        """An id we have booked: counted when it says the same, a dead letter when it does not."""
        record, event = candidate.record, candidate.event
        if conflict:
            self._bury(work, topic, record, DeadLetterReason.CONFLICT)
        if isinstance(event, CommandEvent):
            account = self._account(work, record.key)
            cause = event.cause
            notice = Notice(
                notice=NoticeKind.COMMAND_REFUSED if conflict else NoticeKind.COMMAND_REPEATED,
                tenant_id=record.key.decode(),
                at=work.now,
                caused_by=f"{cause.source}/{cause.id}",
                command_id=cause.id,
                rule="conflict" if conflict else "repeated",
                fix="This id was used for another command; make a new one."
                if conflict
                else "The first answer stands.",
                version=None if account is None else account.standing.settings_version,
            )
            self._notify(work, record.key, notice, cause)
        return "conflict" if conflict else "duplicate"

    def _bury(
        self,
        work: Work,
        topic: str,
        record: Any,
        reason: DeadLetterReason,
        path: str = "",
        exposure_nanos: int | None = None,
    ) -> None:
        """Into the dead letters, byte for byte, with the reason in headers."""
        headers = list(record.headers or ())
        attempt = next((text for name, text in headers if name == "credits-dlq-attempt"), b"1")
        kept = [header for header in headers if not header[0].startswith("credits-dlq-")]
        if exposure_nanos is not None:
            kept.append(("credits-dlq-exposure", text_from(exposure_nanos).encode()))
        work.outputs.append(
            self._names.of(topics.dead_letters_of(topic)),
            self._partition,
            record.key,
            record.value,
            encode_headers(
                [
                    *kept,
                    ("credits-dlq-topic", self._names.of(topic).encode()),
                    ("credits-dlq-partition", str(self._partition).encode()),
                    ("credits-dlq-offset", str(record.offset).encode()),
                    ("credits-dlq-timestamp", str(record.timestamp).encode()),
                    ("credits-dlq-reason", reason.value.encode()),
                    ("credits-dlq-path", path.encode()),
                    ("credits-dlq-attempt", attempt),
                    ("credits-dlq-app-version", VERSION.encode()),
                    ("credits-dlq-failed-at", work.now.isoformat().encode()),
                ]
            ),
        )
        work.tally.add("credits_dead_letters_total", topic, reason.value)

    def _move(self, work: Work, topic: str, fate: Fate) -> None:
        """Publish a misplaced record again where its key belongs, value and headers unchanged."""
        record = fate.record
        headers = list(record.headers or ())
        size = (
            len(record.key)
            + len(record.value or b"")
            + sum(len(name) + len(text or b"") + 16 for name, text in headers)
        )
        moved_before = any(name == MOVED_FROM for name, _ in headers)
        if moved_before or size + MOVED_HEADROOM_BYTES > topics.MAX_RECORD_BYTES:
            self._bury(work, topic, record, DeadLetterReason.WRONG_PARTITION)
            work.tally.add("credits_events_total", topic, "rejected")
            return
        name = self._names.of(topic)
        work.outputs.append(
            name,
            fate.target,
            record.key,
            record.value,
            encode_headers(
                [*headers, (MOVED_FROM, f"{name}/{self._partition}/{record.offset}".encode())]
            ),
        )
        work.tally.add("credits_events_total", topic, "moved")

    # -- closing a batch ---------------------------------------------------------------------

    def close(
        self,
        work: Work,
        taken: Sequence[Slice],
        sources: dict[str, SourcePosition],
        *,
        seen_next: int,
        seen_marks: tuple[SeenMark, ...],
        ledger_from: int,
    ) -> None:
        """Rows, ids and position of a decided batch."""
        partition, outputs = self._partition, work.outputs
        # Not every change of a balance is an entry, and readers drop repeats by id.
        now_us = microseconds(work.now)
        for key, account in work.accounts.items():
            before = work.before[key]
            if before is account:
                continue
            work.rows[key] = encode_row(account)
            work.totals.tenant(before, account)
            balance_id = header(_CE_ID, b"%b/%d/%d" % (key, account.seq, now_us))
            outputs.append(
                self._balance_topic,
                partition,
                key,
                _encode(ledger.public_balance(account, work.now, work.terms.coverage)),
                self._balance_headers + balance_id,
            )
        for key, payment in work.payments.items():
            work.rows[key] = encode_payment(payment)
        for key, hold in work.holds.items():
            work.rows[key] = encode_hold(hold)
        for key, value in work.rows.items():
            work.totals.row(key, self.rows.get(key), value)
            outputs.append(self._changelog_topic, partition, key, value)

        reached = dict(sources)
        for part in taken:
            last = part.records[-1]
            if last.offset >= reached[part.tp.topic].next:
                reached[part.tp.topic] = SourcePosition(
                    next=part.end,
                    last=last.offset,
                    timestamp=last.timestamp,
                    hash=record_hash(last.key, last.value),
                )
        if not work.rows and reached == sources:
            return
        if work.fresh:
            packed = seen.pack(
                ordinal=seen_next,
                ledger_from=ledger_from,
                now_us=now_us,
                fingerprints=list(work.fresh),
                checks=list(work.fresh.values()),
                weeks=work.weeks,
            )
            work.ids = seen.unpack(packed)
            outputs.append(self._names.of(topics.SEEN), partition, b"ids", packed)
            seen_marks = marked(seen_marks, seen_next, now_us)
            seen_next += 1
        work.position = work.totals.position(
            now=work.now, sources=reached, seen_next=seen_next, seen_marks=seen_marks
        )
        outputs.append(
            self._changelog_topic, partition, POSITION_KEY, encode_position(work.position)
        )


def _with_original(work: Work, event: UsageEvent) -> UsageEvent:
    """A correction and what its original has caused; alone, when it has none or comes second."""
    source, corrects = event.cause.source, event.corrects
    if corrects is None or identity.corrected(source, corrects) in work.fresh:
        return event
    original = work.originals.get((source, corrects))
    return event.correcting(original)


def _remember_corrected(work: Work, event: UsageEvent) -> None:
    """Under the last week in which the original can be: as long as that is remembered, it is known
    that it is corrected."""
    corrects = event.corrects
    assert corrects is not None
    work.fresh[identity.corrected(event.cause.source, corrects)] = identity.check_of(
        event.cause.id.encode()
    )
    work.weeks.append(identity.week_of(work.now + FUTURE))


def _funding_event(decoded: Decoded, cause: Cause) -> Event:
    """A command or a result. A tenant that only the envelope or the key named is filled in."""
    event = decoded.event
    if isinstance(event, RechargeResult):
        return ResultEvent(event, cause)
    assert not isinstance(event, (CallUsage, ConferenceUsage))
    if event.tenant_id is None:
        event = msgspec.structs.replace(event, tenant_id=decoded.tenant_id)
    return CommandEvent(event, cause)
