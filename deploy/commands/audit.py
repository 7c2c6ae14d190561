"""`distrl audit`."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import typer

from deploy.commands.arguments import Json, RunPath, print_json
from deploy.exit_codes import EXIT_FAILED

if TYPE_CHECKING:
    from distrl.audit import Audit
    from distrl.audit_tables import Share

SHOWN = 20
"""Violations and re-issued tickets printed; --json has all."""


def audit(run: RunPath, as_json: Json = False) -> None:
    """Prove that no prompt of RUN was lost and no ticket trained twice, from its ledger and journal alone.

    Checks that every ticket is accounted for once, that the order has no gap, that every step trained one whole batch
    within its staleness bound, and that rollouts and checkpoints are on disk under their hashes. Tells drops, redraws
    and waits by length and difficulty, and what was issued again and why. RUN may go on meanwhile; nothing is written.
    The exit status is 1 where a rule is broken.

    Example: distrl audit runs/mine --json
    """
    from deploy.audit import audit_run

    found = audit_run(run)
    if as_json:
        print_json(found.as_json())
    else:
        for line in _lines(found):
            typer.echo(line)
    if found.violations:
        raise typer.Exit(EXIT_FAILED)


def _lines(found: "Audit") -> Iterator[str]:
    yield f"tickets      {_counts(found.tickets)}"
    yield f"steps        {found.steps}, {found.committed_steps} of them committed, {found.abandoned_steps} abandoned"
    yield f"staleness    {_counts({f'{age} steps': n for age, n in found.staleness.items()})}"
    for run, count in found.replayed.items():
        yield f"replayed     {count} trained tickets, of the {found.recorded[run]} that {run} has recorded"
    yield f"off branch   {found.off_branch_tickets} trained tickets with tokens of abandoned weights"
    yield f"dropped      {_counts(found.drops)}"
    yield f"failed calls {_counts(found.failed_calls)}"
    yield f"went back    {_counts(found.returned)}"
    for ticket in found.reissued[:SHOWN]:
        yield "    ticket {ticket_id} was {state}, issued again: {cause}".format(**ticket)
    if len(found.reissued) > SHOWN:
        yield f"    and {len(found.reissued) - SHOWN} more"
    for copy in found.put_back:
        yield (
            f"put back     from the ledger's copy beside {copy['checkpoint']}; what came after is lost, "
            f"{copy['lost_files']} journal files among it, and was sampled again"
        )
    yield f"journal      {found.journal_files} files, {found.journal_bytes} bytes"
    for title, shares in (
        ("by tokens per response", found.selection.by_length),
        ("by the mean reward of the prompt", found.selection.by_difficulty),
    ):
        yield from _table(title, shares)
    for violation in found.violations[:SHOWN]:
        yield f"VIOLATION {violation.rule}: {violation.detail}"
    if len(found.violations) > SHOWN:
        yield f"and {len(found.violations) - SHOWN} more violations"
    yield "no rule is broken" if not found.violations else f"{len(found.violations)} violations"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"


def _table(title: str, shares: "Mapping[str, Share]") -> Iterator[str]:
    yield title
    for name, share in shares.items():
        yield (
            f"    {name:<20} {share.trained} trained, waited {share.waited_s:.1f} s, "
            f"drawn again {share.redrawn} times, dropped {_counts(share.dropped)}"
        )
