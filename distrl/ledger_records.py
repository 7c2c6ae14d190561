"""What a ledger answers to its owner."""

from dataclasses import dataclass
from typing import NamedTuple


class Draw(NamedTuple):
    """What a ticket has to sample: its prompt, and how often it was drawn again, which its noise depends on."""

    ticket_id: int
    prompt_id: str
    redraw: int


@dataclass(frozen=True, slots=True)
class JournalledTicket:
    """A ticket whose rollouts lie in the journal and wait to be trained."""

    ticket_id: int
    redraw: int
    prompt_id: str
    journal_file: str
    journal_sha256: str
    oldest_version: int | None
    newest_version: int | None
    versions: tuple[int, ...]
    """All policy versions that sampled one of its tokens; none of this run where it is replayed."""
    rollouts: int
    reward_mean: float
    response_tokens: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a run that goes on finds in its ledger."""

    ready: tuple[JournalledTicket, ...]
    issued: tuple[Draw, ...]
    """What has to be sampled again, in order."""
