"""`distrl recipes`."""

from typing import Annotated

import typer

from deploy.commands.arguments import Json, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A recipe; all of them without it.")] = None,
    as_json: Json = False,
) -> None:
    """List the objectives that can be trained, or one with its options and what it needs.

    Example: distrl recipes topr
    """
    from deploy import recipes as known

    if as_json:
        print_json(known.recipes() if name is None else known.recipe(name))
    else:
        typer.echo(known.table() if name is None else known.text(name))
