"""What must hold of replayed tickets: each recorded one at most once in every pass, none skipped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from sqlite3 import Row

from distrl.tickets import Origin


def check_replays(
    tickets: Iterable[Row], origins: Mapping[int, Origin], recorded: Mapping[str, int], epochs: int
) -> Iterator[str]:
    """Broken rules, in words.

    Args:
        tickets: rows of the ledger's table of tickets.
        origins: where the replayed ones come from.
        recorded: tickets of each recording, by its run.
        epochs: how often each may be replayed.
    """
    issued = {t["ticket_id"] for t in tickets}
    for ticket_id in sorted(origins.keys() - issued):
        yield f"ticket {ticket_id} is replayed, and was never issued"
    seen: dict[Origin, int] = {}
    for ticket_id, origin in sorted(origins.items()):
        name = f"ticket {origin.ticket_id} of {origin.run}"
        if origin in seen:
            yield f"{name} is replayed twice in pass {origin.epoch + 1}, as tickets {seen[origin]} and {ticket_id}"
        seen.setdefault(origin, ticket_id)
        if origin.epoch >= epochs:
            yield f"{name} is replayed in pass {origin.epoch + 1}, replay.epochs is {epochs}"
    yield from _check_order([origin for _, origin in sorted(origins.items())], recorded)


def _check_order(origins: Sequence[Origin], recorded: Mapping[str, int]) -> Iterator[str]:
    """Recorded tickets come in the order of the recording, and a pass begins when the one before is complete."""
    passes: dict[tuple[str, int], int] = {}
    for origin in origins:
        passes[origin.run, origin.epoch] = passes.get((origin.run, origin.epoch), 0) + 1
    for before, after in pairwise(origins):
        if (before.epoch, before.ticket_id) > (after.epoch, after.ticket_id):
            yield f"ticket {after.ticket_id} of {after.run} is replayed after ticket {before.ticket_id}"
            return
    for run, epoch in list(passes)[:-1]:
        found, wanted = passes[run, epoch], recorded[run]
        if found != wanted:
            yield f"pass {epoch + 1} over {run} must have replayed its {wanted} tickets, got {found}"
