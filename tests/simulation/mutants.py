"""Protections taken out, one at a time: what the simulation must notice.

Each is a context manager over the engine's own code; the product has no such switches.
"""

import contextlib
import itertools
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Final
from unittest import mock

import msgspec
from aiokafka import TopicPartition

from schemas import topics
from schemas.funding import Status
from schemas.ledger import EntryKind
from schemas.notices import DeadLetterReason, Withheld
from streams.billing import booking, charging, commands, ledger, recharge, results
from streams.billing.account import decode_row
from streams.billing.booking import RefusedError
from streams.billing.outcomes import Finding
from streams.billing.stages import Stage
from streams.engine import batch, identity, originals, restore, rows, seen, shard, transaction
from streams.engine.errors import FencedError, UnknownOutcomeError
from streams.engine.position import SourcePosition
from streams.engine.rows import Rows
from streams.settings import Settings
from tests.batches import records_of
from tests.simulation import clients
from tests.simulation.clients import NETWORK
from tests.simulation.loop import PROCESS


def _patched(owner: Any, name: str, new: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, new)


def no_fence() -> AbstractContextManager[Any]:
    """Every process has transactional ids of its own: a zombie's commit is accepted."""

    def unshared(self: Settings, partition: int) -> str:
        process = PROCESS.get()
        return f"{self.app_id}-{partition}-{process.name if process else ''}"

    return _patched(Settings, "transactional_id", unshared)


def fence_last() -> AbstractContextManager[Any]:
    """Restore first and fence afterwards: what the former owner commits in between is missed."""
    restored = restore.restore

    async def hasty(
        settings: Any, partition: int, marks: Any, _: Any, wall: Any, *turn: Any
    ) -> Any:
        found = await restored(settings, partition, marks, {}, wall, *turn)
        await _starting.pop((PROCESS.get(), partition))()
        return found

    start = transaction.Transactor.start
    _starting: dict[Any, Callable[[], Any]] = {}

    async def later(self: Any) -> None:
        _starting[PROCESS.get(), self._partition] = lambda: start(self)

    stack = contextlib.ExitStack()
    stack.enter_context(_patched(shard, "restore", hasty))
    stack.enter_context(_patched(transaction.Transactor, "start", later))
    stack.enter_context(no_barrier())
    return stack


def no_barrier() -> AbstractContextManager[Any]:
    """Believe whoever says where the log ends."""

    async def nothing(*_: Any) -> dict[Any, int]:
        return {}

    return _patched(transaction.Transactor, "barrier", nothing)


def lagging_ledger_is_deleted() -> AbstractContextManager[Any]:
    """What a replica does not have yet is taken for deleted."""

    async def everything(self: Any, tp: Any) -> int:
        return 1 << 60

    return _patched(originals.Originals, "_start", everything)


def no_position_check() -> AbstractContextManager[Any]:
    """Book records below the position again, and take any slice."""

    def anywhere(self: Any, taken: Any, _: Any) -> list[Any]:
        for part in taken:
            source = self._sources[part.tp.topic]
            first = min(source.next, part.follows)
            self._sources[part.tp.topic] = SourcePosition(next=first, last=source.last)
        return list(taken)

    return _patched(shard.Shard, "_chained", anywhere)


def no_dedup() -> AbstractContextManager[Any]:
    """Recognise nothing: every repeat is new."""
    numbers = itertools.count(1)
    return _patched(identity, "fingerprint", lambda *_: next(numbers))


def no_chain() -> AbstractContextManager[Any]:
    """Take whatever slice comes next, whatever was lost before it."""
    return _patched(shard.Shard, "_chained", lambda self, taken, _: list(taken))


def offsets_first() -> AbstractContextManager[Any]:
    """Commit the offsets in a transaction before that of the rows, and go by them."""
    committed = transaction.Transactor.commit
    opened = shard.Shard.open

    async def split(self: Any, outputs: Any, offsets: Any) -> Any:
        await committed(self, self.outputs(0), offsets)
        return await committed(self, outputs, {})

    async def by_the_group(self: Any, *turn: Any) -> None:
        await opened(self, *turn)
        group = NETWORK.get().broker.group(self._settings.app_id)
        for tp, offset in group.offsets.items():
            if tp.partition == self.partition and tp.topic in self._sources:
                self._sources[tp.topic] = SourcePosition(next=offset)

    stack = contextlib.ExitStack()
    stack.enter_context(_patched(transaction.Transactor, "commit", split))
    stack.enter_context(_patched(shard.Shard, "open", by_the_group))
    return stack


def group_decides() -> AbstractContextManager[Any]:
    """Go by the group's committed offsets instead of the position row."""
    opened = shard.Shard.open

    async def by_the_group(self: Any, *turn: Any) -> None:
        await opened(self, *turn)
        group = NETWORK.get().broker.group(self._settings.app_id)
        for tp, offset in group.offsets.items():
            if tp.partition == self.partition and tp.topic in self._sources:
                self._sources[tp.topic] = SourcePosition(next=offset)

    return _patched(shard.Shard, "open", by_the_group)


def unknown_is_committed() -> AbstractContextManager[Any]:
    """After an unknown outcome go on as if it had been committed."""
    committed = transaction.Transactor.commit

    async def hopeful(self: Any, outputs: Any, offsets: Any) -> Any:
        try:
            return await committed(self, outputs, offsets)
        except UnknownOutcomeError:
            self.drop()
            await self.start()
            return {}

    return _patched(transaction.Transactor, "commit", hopeful)


def unknown_is_aborted() -> AbstractContextManager[Any]:
    """After an unknown outcome write the same again."""
    committed = transaction.Transactor.commit

    async def stubborn(self: Any, outputs: Any, offsets: Any) -> Any:
        try:
            return await committed(self, outputs, offsets)
        except UnknownOutcomeError:
            self.drop()
            await self.start()
            return await committed(self, outputs, offsets)

    return _patched(transaction.Transactor, "commit", stubborn)


def restore_stops_short() -> AbstractContextManager[Any]:
    """A restore that skips the last record of the table."""
    load = Rows.load

    def short(self: Rows, records: Any) -> None:
        kept = list(records)
        if kept and kept[-1][0] == rows.POSITION_KEY:
            del kept[-2:-1]
        load(self, kept)

    return _patched(Rows, "load", short)


def restore_one_batch_short() -> AbstractContextManager[Any]:
    """A restore that ends before the last transaction, position row and all, as one of an older
    copy does, and looks neither at where the remembered ids end nor at where the ledger does."""
    load = Rows.load

    def short(self: Rows, records: Any) -> None:
        kept = list(records)
        places = [at for at, (key, _) in enumerate(kept) if key == rows.POSITION_KEY]
        if len(places) > 1:
            kept = kept[: places[-2] + 1]
        load(self, kept)

    stack = contextlib.ExitStack()
    stack.enter_context(_patched(Rows, "load", short))
    stack.enter_context(_patched(restore, "_check_ids", lambda *_, **__: None))
    stack.enter_context(_patched(restore, "_check_ledger", lambda *_: None))
    return stack


def restore_reads_aborted() -> AbstractContextManager[Any]:
    """A restore that takes aborted records for committed ones."""

    def uncommitted(settings: Settings, *, committed: bool = True) -> Any:
        return clients.Consumer(committed=False)

    return _patched(clients, "restore_reader", uncommitted)


def restore_blames_the_log() -> AbstractContextManager[Any]:
    """Somebody else's half batch is taken for a loss: the shard stops instead of giving way."""
    restored = restore.restore

    async def blaming(*arguments: Any) -> Any:
        try:
            return await restored(*arguments)
        except FencedError as error:
            raise error.__context__ or error from None

    return _patched(shard, "restore", blaming)


def sources_read_aborted() -> AbstractContextManager[Any]:
    """Book what a producer has given up."""

    def uncommitted(settings: Settings, *, committed: bool = True) -> Any:
        return clients.Consumer(committed=False)

    return _patched(clients, "source_reader", uncommitted)


def corrected_again() -> AbstractContextManager[Any]:
    """That an event is corrected is not remembered."""
    return _patched(batch, "_remember_corrected", lambda *_: None)


def originals_one_batch_off() -> AbstractContextManager[Any]:
    """What a correction corrects is looked for in the batch before."""
    found = seen.Seen.ledger_range

    def before(self: Any, ordinal: int, ledger_end: int) -> tuple[int, int]:
        return found(self, max(self._starts._first, ordinal - 1), ledger_end)

    return _patched(seen.Seen, "ledger_range", before)


def asked_for_once_booked_twice() -> AbstractContextManager[Any]:
    """An adjustment is booked twice by one command."""
    adjust = commands._adjust

    def twice(draft: Any, command: Any) -> None:
        adjust(draft, command)
        adjust(draft, command)

    return _patched(commands, "_adjust", twice)


def asked_for_and_not_booked() -> AbstractContextManager[Any]:
    """An adjustment is applied, as its answer says, and books nothing."""
    return _patched(commands, "_adjust", lambda *_: None)


def time_gives_money() -> AbstractContextManager[Any]:
    """With every tick comes money that nobody has asked for."""
    passed = ledger._pass_time

    def generous(draft: Any, at: Any, terms: Any) -> None:
        passed(draft, at, terms)
        draft.credit(EntryKind.ADJUSTMENT, 1_000_000_000)

    return _patched(ledger, "_pass_time", generous)


def calls_give_money() -> AbstractContextManager[Any]:
    """With every charge comes money that nobody has asked for."""
    charge = charging.charge

    def generous(draft: Any, *arguments: Any) -> str:
        label = charge(draft, *arguments)
        if label == "charged":
            draft.credit(EntryKind.ADJUSTMENT, 1_000_000_000)
        return label

    return _patched(charging, "charge", generous)


def payments_refused() -> AbstractContextManager[Any]:
    """What was paid is a dead letter, and is not credited."""
    book = results._book

    def refusing(draft: Any, event: Any, *arguments: Any) -> None:
        if event.result.status is Status.SUCCEEDED:
            raise RefusedError(DeadLetterReason.REFUSED, "$.status")
        book(draft, event, *arguments)

    return _patched(results, "_book", refusing)


def _some(event: Any) -> bool:
    """A fifth of all events."""
    return identity.fingerprint(event.cause.source, event.cause.id) % 5 == 0


def sound_is_out_of_shape() -> AbstractContextManager[Any]:
    """Sound events are dead letters for their shape."""
    judge = ledger.Punctuality.judge

    def strict(self: Any, event: Any) -> Any:
        return judge(self, event) or (DeadLetterReason.SCHEMA_VIOLATION if _some(event) else None)

    return _patched(ledger.Punctuality, "judge", strict)


def new_is_a_conflict() -> AbstractContextManager[Any]:
    """Events that nobody has seen contradict something."""
    probe = seen.Seen.probe

    def believing(self: Any, fingerprints: Any) -> Any:
        known = probe(self, fingerprints)
        for at, fingerprint in enumerate(fingerprints):
            if fingerprint % 5 == 0:
                known.setdefault(at, 1)
        return known

    return _patched(seen.Seen, "probe", believing)


def ids_at_random() -> AbstractContextManager[Any]:
    """A request is not named after tenant, epoch and attempt: asked twice, it has two names."""
    numbers = itertools.count(1)
    return _patched(
        recharge, "recharge_id", lambda *_: str(uuid.uuid5(recharge.RECHARGES, str(next(numbers))))
    )


def _not_in_flight(account: Any) -> Any:
    free = msgspec.structs.replace(account.standing.recharging, stage=Stage.IDLE, asked=None)
    return account.changed(recharging=free)


def none_in_flight() -> AbstractContextManager[Any]:
    """That a request waits for its answer is not remembered."""
    request = recharge._request

    def forgetful(draft: Any, *arguments: Any) -> None:
        request(draft, *arguments)
        draft.account = _not_in_flight(draft.account)

    return _patched(recharge, "_request", forgetful)


def in_flight_lost_on_restore() -> AbstractContextManager[Any]:
    """That a request waits for its answer does not outlive the worker."""

    def forgetful(value: bytes) -> Any:
        account = decode_row(value)
        return account if account.standing.recharging.asked is None else _not_in_flight(account)

    return _patched(batch, "decode_row", forgetful)


def credited_by_tenant() -> AbstractContextManager[Any]:
    """Whatever is paid for a tenant is its last recharge, whoever asked for it."""

    def last(account: Any, _: str) -> Any:
        attempts = account.standing.recharging.attempts
        return attempts[-1] if attempts else None

    return _patched(recharge, "attempt_of", last)


def asks_for_too_much() -> AbstractContextManager[Any]:
    """Ten times what the policy says."""
    wanted = recharge.wanted
    return _patched(recharge, "wanted", lambda *arguments: 10 * wanted(*arguments))


def asks_for_nothing() -> AbstractContextManager[Any]:
    """Whoever runs out of money stays without it."""
    return _patched(recharge, "consider", lambda *_, **__: None)


def asks_without_a_word() -> AbstractContextManager[Any]:
    """A request goes out without its notice."""
    request = recharge._request

    def silent(draft: Any, *arguments: Any) -> None:
        told = draft.notices
        request(draft, *arguments)
        draft.notices = told

    return _patched(recharge, "_request", silent)


def asks_in_the_cooldown() -> AbstractContextManager[Any]:
    """Whoever was answered may ask at once."""
    cool = recharge._cool

    def warm(draft: Any, *, succeeded: bool) -> None:
        cool(draft, succeeded=succeeded)
        recharge._move(draft, stage=Stage.IDLE, until=None)

    return _patched(recharge, "_cool", warm)


def asks_more_often_than_it_may() -> AbstractContextManager[Any]:
    """What came is not counted."""
    return _patched(recharge, "count_money", lambda *_, **__: None)


def asks_again_at_once() -> AbstractContextManager[Any]:
    """Whoever was declined by all cards may ask again in the next batch."""
    return _patched(recharge, "BACKOFF", timedelta())


def asks_the_first_card_again() -> AbstractContextManager[Any]:
    """The card that was declined is asked, and never the one after it."""
    return _patched(recharge, "_next_index", lambda *_: 0)


def asks_cards_that_are_lost() -> AbstractContextManager[Any]:
    """No decline is final."""
    return _patched(recharge, "TERMINAL_CODES", frozenset())


def pauses_for_any_reason() -> AbstractContextManager[Any]:
    """Every decline is final, whatever its code, and told as one too many."""
    return _patched(recharge, "PAUSE_AFTER_DECLINES", 1)


def stale_every_other_time() -> AbstractContextManager[Any]:
    """Whether a balance is stale is not one answer for a batch."""
    numbers = itertools.count()
    guards = tuple(
        (name, (lambda _: Finding(bool(next(numbers) % 2))) if name is Withheld.STALE else guard)
        for name, guard in recharge.GUARDS
    )
    return _patched(recharge, "GUARDS", guards)


def asks_beside_the_transaction() -> AbstractContextManager[Any]:
    """A request goes out by itself before its batch is committed."""
    committed = transaction.Transactor.commit

    async def beside(self: Any, outputs: Any, offsets: Any) -> Any:
        place = self._settings.topics.of(topics.REQUESTED), self._partition
        for asked in outputs._batches.pop(place, ()):
            contents = [
                (record.key, record.value, tuple(record.headers), record.timestamp)
                for record in records_of(asked)
            ]
            NETWORK.get().broker.append(TopicPartition(*place), contents)
        return await committed(self, outputs, offsets)

    return _patched(transaction.Transactor, "commit", beside)


def swallowed_half_way() -> AbstractContextManager[Any]:
    """An exception between the change of a balance and its entry is swallowed: the first stays,
    the second never comes. The core's own assertion of that is out as well."""
    book = booking.Draft.book

    def half(self: Any, *arguments: Any, **named: Any) -> None:
        book(self, *arguments, **named)
        if identity.fingerprint(self.cause.source, self.cause.id) % 5 == 0:
            self.entries, self.moved = self.entries[:-1], self.moved[:-1]

    stack = contextlib.ExitStack()
    stack.enter_context(_patched(booking.Draft, "book", half))
    stack.enter_context(_patched(booking.Draft, "check_books", lambda _: None))
    return stack


def what_is_now_counts() -> AbstractContextManager[Any]:
    """Usage is judged by whether the account is open now, not when the call started."""
    return _patched(charging, "billable", lambda account, _: account.standing.closed_at is None)


class _Known(dict[bytes, bytes]):
    def __contains__(self, _: object) -> bool:
        return True


def booked_where_it_lies() -> AbstractContextManager[Any]:
    """What strayed is not moved home, so each partition knows only the repeats of its own."""
    read = batch.Decider.read

    def anywhere(self: Any, *arguments: Any) -> Any:
        rows, self.rows = self.rows, _Known()
        try:
            return read(self, *arguments)
        finally:
            self.rows = rows

    return _patched(batch.Decider, "read", anywhere)


MUTANTS: Final[dict[str, Callable[[], AbstractContextManager[Any]]]] = {
    "no_fence": no_fence,
    "fence_last": fence_last,
    "no_barrier": no_barrier,
    "no_position_check": no_position_check,
    "no_dedup": no_dedup,
    "no_chain": no_chain,
    "offsets_first": offsets_first,
    "group_decides": group_decides,
    "unknown_is_committed": unknown_is_committed,
    "unknown_is_aborted": unknown_is_aborted,
    "restore_stops_short": restore_stops_short,
    "restore_one_batch_short": restore_one_batch_short,
    "restore_reads_aborted": restore_reads_aborted,
    "restore_blames_the_log": restore_blames_the_log,
    "sources_read_aborted": sources_read_aborted,
    "corrected_again": corrected_again,
    "originals_one_batch_off": originals_one_batch_off,
    "lagging_ledger_is_deleted": lagging_ledger_is_deleted,
    "asked_for_once_booked_twice": asked_for_once_booked_twice,
    "asked_for_and_not_booked": asked_for_and_not_booked,
    "time_gives_money": time_gives_money,
    "calls_give_money": calls_give_money,
    "payments_refused": payments_refused,
    "sound_is_out_of_shape": sound_is_out_of_shape,
    "new_is_a_conflict": new_is_a_conflict,
    "ids_at_random": ids_at_random,
    "none_in_flight": none_in_flight,
    "in_flight_lost_on_restore": in_flight_lost_on_restore,
    "credited_by_tenant": credited_by_tenant,
    "asks_for_too_much": asks_for_too_much,
    "asks_for_nothing": asks_for_nothing,
    "asks_without_a_word": asks_without_a_word,
    "asks_in_the_cooldown": asks_in_the_cooldown,
    "asks_more_often_than_it_may": asks_more_often_than_it_may,
    "asks_again_at_once": asks_again_at_once,
    "asks_the_first_card_again": asks_the_first_card_again,
    "asks_cards_that_are_lost": asks_cards_that_are_lost,
    "pauses_for_any_reason": pauses_for_any_reason,
    "stale_every_other_time": stale_every_other_time,
    "asks_beside_the_transaction": asks_beside_the_transaction,
    "swallowed_half_way": swallowed_half_way,
    "what_is_now_counts": what_is_now_counts,
    "booked_where_it_lies": booked_where_it_lies,
}
