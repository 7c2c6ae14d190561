"""`distrl vstar`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from deploy.commands.arguments import ConfigPath, Json, Overrides, print_json

if TYPE_CHECKING:
    from deploy.vstar import Advance


def vstar(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Estimate the optimal value of every training prompt of CONFIG from the reference model, for A*-PO.

    Samples vstar.responses responses per prompt with the generation and grading actors and writes vstar.path. Ctrl-C
    stops it, and the next call goes on; a table that is complete is used again.

    Example: distrl vstar mine.yaml vstar.path=runs/values.parquet vstar.beta=0.5
    """
    from deploy.vstar import make_table
    from distrl.config import load_config

    loaded = load_config(config, overrides or [])
    with _progress() as advance:
        found = make_table(loaded, advance)
    if as_json:
        print_json(found)
        return
    how = f"soft at beta {found['beta']:g}" if found["mode"] == "soft" else found["mode"]
    typer.echo(
        f"{found['path']}: {found['prompts']} prompts, {found['sampled']} sampled now; the reference solved "
        f"{found['solved']:.1%}; mean V* {found['v_star_mean']:.4f} ({how}); {found['wall_s']:.0f} s"
    )


@contextmanager
def _progress() -> Iterator["Advance"]:
    """A bar on a terminal, elsewhere a line per tenth of the prompts; on the error stream."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        last = -1

        def plain(done: int, total: int) -> None:
            nonlocal last
            tenth = done * 10 // max(total, 1)
            if tenth != last:
                last = tenth
                typer.echo(f"{done} of {total} prompts", err=True)

        yield plain
        return
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("sampling the reference", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
