"""`distrl recipes`."""

from typing import Annotated

import typer

from deploy.commands.arguments import Json, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A recipe; all of them without it.")] = None,
    as_json: Json = False,
) -> None:
    """List the objectives that can be trained, or one with its formula, its options and what it needs.

    Example: distrl recipes topr
    """
    from distrl.objectives import describe

    if as_json:
        print_json(describe.recipes() if name is None else describe.recipe(name))
    else:
        typer.echo(describe.table() if name is None else describe.text(name))
