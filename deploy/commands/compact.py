"""`distrl compact`."""

from dataclasses import asdict
from typing import Annotated

import typer

from deploy.commands.arguments import Json, RunPath, print_json

Drop = Annotated[bool, typer.Option("--drop-committed", help="Delete the rollouts of committed tickets, too.")]


def compact(run: RunPath, drop_committed: Drop = False, as_json: Json = False) -> None:
    """Make the journal of a stopped RUN small: what its ledger names, in few files.

    Rollouts of tickets that were dropped or sampled again go; those of committed tickets stay, unless
    --drop-committed is given. Files are copied, then the ledger changes in one transaction, then the old files are
    deleted.

    Example: distrl compact runs/mine --drop-committed
    """
    from deploy.compact import compact_run

    found = compact_run(run, drop_committed=drop_committed)
    if as_json:
        print_json(asdict(found))
    else:
        typer.echo(
            f"{run}: {found.files_before} files with {found.bytes_before} bytes became {found.files_after} with "
            f"{found.bytes_after}; the rollouts of {found.retired} committed tickets were given up"
        )
