"""Arguments that several commands take, and how JSON is printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to override, such as train.steps=20."),
]
AllowUnsandboxed = Annotated[
    bool,
    typer.Option("--allow-unsandboxed", help="Run programs of the model without a sandbox where there is none."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run, such as runs/mine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for another program to read.")]


def with_sandbox(overrides: list[str] | None, allow_unsandboxed: bool) -> list[str]:
    """The overrides with what `--allow-unsandboxed` stands for."""
    return [*(overrides or []), *(["sandbox.allow_unsandboxed=true"] if allow_unsandboxed else [])]


def print_json(values: Any) -> None:
    """One JSON document on the standard output; progress and errors go to the other stream."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))
