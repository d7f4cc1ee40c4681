"""The source topics, record by record: what each holds, and whom that concerns."""

from collections.abc import Iterator

from schemas import topics
from streams.testbed.auditor.events import Event, understand
from streams.testbed.auditor.letters import Letters, Moves, Refusals
from streams.testbed.auditor.recharges import Recharges
from streams.testbed.auditor.records import Record
from streams.testbed.auditor.view import View


class Sources:
    """The sources of a partition, and what became of records that are not booked: `letters`, why
    they are some (`refusals`), and `moves` to where they belong."""

    def __init__(
        self,
        view: View,
        letters: Letters,
        refusals: Refusals,
        moves: Moves,
        recharges: Recharges,
    ) -> None:
        self._view = view
        self._recharges = recharges
        self.letters = letters
        self.refusals = refusals
        self.moves = moves

    def events(self, topic: str) -> Iterator[tuple[Record, Event]]:
        """The events of a topic. What holds none must be a dead letter; what is another tenant's
        than the one looked at is left out, and what is pending counted."""
        for record in self._view.records(topic):
            self.moves.look(topic, record)
            event = understand(record, topic)
            if isinstance(event, str):
                if topic in topics.USAGE:
                    self._view.report.count("events")
                self.letters.must_be_letter(record, topic, event)
                continue
            if (event.source, event.id) in self.letters.disputed:
                self.letters.disputed[event.source, event.id].append(event)
            if not self._view.wanted(event.tenant):
                continue
            self._recharges.record(
                event.place,
                event.tenant,
                f"{event.source}/{event.id}",
                event.body,
                refused=bool(self.letters.reasons(event.place)) or self._view.strayed(record),
            )
            yield record, event
        for record in self._view.later(topic):
            self._view.report.count("pending")
            self.moves.look(topic, record, later=True)
