"""Which recorded ticket is replayed next: the ledger counts, the recording has the order."""

from collections import deque

from distrl.errors import RunError
from distrl.ledger import Draw, Ledger
from distrl.recording import Recording
from distrl.tickets import Origin, Recorded


class Replays:
    """The tickets of a run that another run has recorded.

    Args:
        epochs: how often each recorded ticket may be replayed.
    Raises:
        LedgerError: the run began with another recording.
    """

    def __init__(self, ledger: Ledger, recording: Recording, epochs: int) -> None:
        ledger.name_recording(recording.run, len(recording.tickets), recording.sha256)
        self._ledger = ledger
        self._recording = recording
        self._epochs = epochs
        self._source = recording.by_ticket()
        self._origins = ledger.replays()
        self._again: deque[Draw] = deque()

    def recorded(self, ticket_id: int) -> Recorded | None:
        """What a ticket replays; None for one that was sampled."""
        origin = self._origins.get(ticket_id)
        return None if origin is None else self._source[origin.ticket_id]

    def put_back(self, draw: Draw) -> None:
        """A replayed ticket has to be had from the recording again."""
        self._again = deque(sorted((*self._again, draw)))

    def next(self) -> Draw:
        """The next ticket, issued or issued again.

        Raises:
            RunError: each recorded ticket was replayed as often as it may be.
        """
        if self._again:
            return self._again.popleft()
        draw, origin = self._ledger.issue_replay(self._at)
        self._origins[draw.ticket_id] = origin
        return draw

    def _at(self, position: int) -> tuple[str, Origin]:
        recorded, origin = self._recording.at(position)
        if origin.epoch >= self._epochs:
            raise RunError(
                f"replay.epochs must be at least {origin.epoch + 1}, got {self._epochs}: the {len(self._source)} "
                f"tickets of the recording {self._recording.run} were all replayed, and there is none left in place of "
                "one that was dropped; raise it in the run's config.yaml, then go on with distrl resume"
            )
        return recorded.prompt_id, origin
