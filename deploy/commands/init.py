"""`distrl init` and `distrl schema`: what helps to write a config."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.starter_tasks import TaskName


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write.")] = Path("config.yaml"),
    task: Annotated[TaskName, typer.Option(help="Where the prompts come from.")] = "jsonl",
) -> None:
    """Write a commented config to start from.

    It has every section, the keys that people change with what they mean, and a line that lets an editor complete and
    check it. An existing file is never overwritten.

    Example: distrl init mine.yaml --task jsonl
    """
    from deploy.starter import FILL_IN, write_starter

    write_starter(path, task)
    typer.echo(f"wrote {path}; the lines that end in {FILL_IN.strip()!r} lack their value. Then:")
    typer.echo(f"    distrl validate {path}")
    typer.echo(f"    distrl train {path}")


def schema() -> None:
    """Print the JSON schema of configs, with which editors complete and check them.

    Example: distrl schema > config.schema.json
    """
    from deploy.config_schema import render

    typer.echo(render(), nl=False)
