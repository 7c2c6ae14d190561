"""Tickets: the unit of work and of accounting, and the states it may pass through.

    issued -> generated -> ready -> trained -> committed
       \\__________\\_________\\______-> dropped(reason)

A ticket is one draw of a prompt. It ends committed (its step is part of a saved checkpoint) or dropped with a reason;
after a crash, what was trained since the last checkpoint goes back to ready or issued.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from distrl.errors import LedgerError
from distrl.schema import Role
from distrl.tasks.problem import Message


class TicketState(StrEnum):
    ISSUED = "issued"
    GENERATED = "generated"
    READY = "ready"
    TRAINED = "trained"
    COMMITTED = "committed"
    DROPPED = "dropped"


_S = TicketState
TRANSITIONS: dict[TicketState, frozenset[TicketState]] = {
    _S.ISSUED: frozenset({_S.GENERATED, _S.DROPPED}),
    _S.GENERATED: frozenset({_S.READY, _S.DROPPED, _S.ISSUED}),
    _S.READY: frozenset({_S.TRAINED, _S.DROPPED, _S.ISSUED}),
    _S.TRAINED: frozenset({_S.COMMITTED, _S.READY, _S.ISSUED}),
    _S.COMMITTED: frozenset(),
    _S.DROPPED: frozenset(),
}
"""Where each state may go. Backward arrows are for recovery; committed and dropped are final."""


class DropReason(StrEnum):
    """Why a ticket will never be trained. A failure is one of these, never a zero reward."""

    GENERATION_FAILED = "generation_failed"
    GRADING_FAILED = "grading_failed"
    REFERENCE_FAILED = "reference_failed"
    JOURNAL_FAILED = "journal_failed"
    REPLAY_FAILED = "replay_failed"
    """Its rollouts could not be had from the recording."""
    POISON = "poison"
    """Worker after worker died that had it."""
    TOO_STALE = "too_stale"
    """It was drawn again `limits.redraws` times, and was too late each time."""
    RUN_ENDED = "run_ended"


POLICY_WEIGHTS = "policy"
"""Name of the weights that are trained."""

_WEIGHTS = {Role.REFERENCE: "reference", Role.OPPONENT: "opponent"}


def weights_of(role: str) -> str:
    """Name of the weights that a role's responses are sampled from.

    `policy`: the newest that the learner published, or, of what is replayed, those of the run that recorded it.
    `reference`: the reference model, fixed. `opponent`: an anchor of the policy, published under that name.
    """
    return _WEIGHTS.get(Role(role), POLICY_WEIGHTS)


class ReturnCause(StrEnum):
    """Why a ticket went back to an earlier state."""

    RESTART = "restart"
    """It was being sampled or graded when the process that followed it ended."""
    ROLLBACK = "rollback"
    """Its step was not part of a checkpoint when the learner ended."""
    ABANDONED = "abandoned"
    """Weights sampled it that were left by a roll-back, and `train.abandoned_rollouts` is `drop`."""
    TOO_STALE = "too_stale"
    """It could not be trained within `train.max_staleness` any more."""
    REDRAWN = "redrawn"
    """The next step would have made it too stale before it was ready, and `train.on_stale` is `redraw`."""
    DATA_LOST = "data_lost"
    """Its rollouts were lost with a node before they were in the journal."""


def check_transition(ticket_id: int, old: TicketState, new: TicketState) -> None:
    """Raises LedgerError when a ticket may not go from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing: it is final"
        raise LedgerError(f"ticket {ticket_id} cannot go from {old} to {new}; from {old} it may go to {allowed}")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A ticket that another run recorded, and where its rollouts are; see `distrl.recording`."""

    ticket_id: int
    """In the run that recorded it, as the next."""
    redraw: int
    prompt_id: str
    rollouts: int
    response_tokens: int
    file: str
    """Name of the journal file."""
    sha256: str
    """Of that file."""


class Origin(NamedTuple):
    """Which recorded ticket a ticket replays, and in which pass over the recording."""

    run: str
    ticket_id: int
    epoch: int
    """The first is 0."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One draw of a prompt, as the generation stage gets it."""

    ticket_id: int
    """Grows by one per draw; batches of a synchronous run are in this order."""
    redraw: int
    """How often this ticket was drawn again; part of its sampling noise."""
    prompt_id: str
    prompt: str
    role: str
    group_size: int
    """Responses to sample."""
    stream: tuple[int, ...]
    """Names the ticket's sampling noise (`distrl.seeding`)."""
    messages: tuple[Message, ...] = ()
    """The conversation, where the prompt is one; generation applies the model's chat template to it."""
    v_star: float | None = None
    """The prompt's optimal value, where the objective reads one; see `distrl.values_table`."""
    recorded: Recorded | None = None
    """What it replays: its rollouts are those of another run's ticket; None samples them."""

    def rollout_id(self, group_index: int) -> str:
        return f"{self.role[0]}{self.ticket_id}.{self.redraw}.{group_index}"
