"""`distrl export`."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.arguments import Json, print_json

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run, such as runs/mine.")]
Which = Annotated[str, typer.Option(help="last, best (by held-out accuracy) or a name such as step-000020.")]
Out = Annotated[Path | None, typer.Option(help="Directory to make; without it one in RUN/exports.")]


def export(run: Run, checkpoint: Which = "last", out: Out = None, as_json: Json = False) -> None:
    """Write a checkpoint of RUN as a Hugging Face directory, which from_pretrained loads.

    It has weights, config and tokenizer, and distrl.json, which says what it is; no optimizer. The checkpoint is one
    that the run's ledger names, its hash is verified, and the directory is complete or absent. RUN may go on meanwhile.

    Example: distrl export runs/mine --checkpoint best --out models/mine
    """
    from deploy.export import export as write

    made = write(run, checkpoint, out)
    if as_json:
        print_json(made)
    else:
        typer.echo(f"wrote {made['path']}: {made['checkpoint']} of {made['run']}, policy version {made['version']}")
