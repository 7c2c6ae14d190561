"""`distrl ui` and `distrl rollouts`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.arguments import Json, RunPath, print_json

Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen at; another one shows the run to others.")]
Search = Annotated[str, typer.Option("--search", help="Part of a prompt, response, reason or id.")]
Verdict = Annotated[str | None, typer.Option("--verdict", help="correct, wrong or failed.")]
RewardMin = Annotated[float | None, typer.Option("--reward-min", help="Smallest reward.")]
RewardMax = Annotated[float | None, typer.Option("--reward-max", help="Largest reward.")]
Staleness = Annotated[int | None, typer.Option("--staleness", help="Optimizer steps behind when it was trained.")]
Version = Annotated[int | None, typer.Option("--version", help="A policy version that sampled some of its tokens.")]
Step = Annotated[int | None, typer.Option("--step", help="The step that trained it.")]
Dropped = Annotated[str | None, typer.Option("--dropped", help="A drop reason, or any.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Most rollouts to show.")]
Show = Annotated[str | None, typer.Option("--show", metavar="ID", help="One rollout in full.")]


def ui(run: RunPath, port: Port = 0, host: Host = "127.0.0.1") -> None:
    """Show RUN in a browser: curves, timeline, every rollout, processes; follows a run that goes on. Ctrl-C ends it.

    Example: distrl ui runs/mine --port 8080
    """
    from deploy.run_dir import find_run
    from deploy.ui.server import Server

    server = Server(find_run(run), host, port)
    typer.echo(f"{server.url} shows {run}; Ctrl-C ends it")
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()


def rollouts(
    run: RunPath,
    search: Search = "",
    verdict: Verdict = None,
    reward_min: RewardMin = None,
    reward_max: RewardMax = None,
    staleness: Staleness = None,
    version: Version = None,
    step: Step = None,
    dropped: Dropped = None,
    limit: Limit = 20,
    show: Show = None,
    as_json: Json = False,
) -> None:
    """List rollouts of RUN, newest tickets first, or one in full with --show; what the live page shows, on a terminal.

    Example: distrl rollouts runs/mine --verdict wrong --search 31415 --limit 5
    """
    from deploy.run_dir import find_run
    from deploy.ui.index import Filter, open_index

    run_dir = find_run(run)
    index = open_index(run_dir)
    try:
        index.refresh()
        if show is not None:
            _show(run_dir.path, index.one(show), show, as_json=as_json)
            return
        wanted = Filter(search, verdict, reward_min, reward_max, staleness, version, step, dropped)
        found, matching = index.find(wanted, limit=limit)
    finally:
        index.close()
    if as_json:
        print_json({"matching": matching, "rollouts": found})
    else:
        _list(found, matching)


def _show(run: Path, row: dict[str, Any] | None, rollout_id: str, *, as_json: bool) -> None:
    from deploy.report.text import visible
    from distrl.errors import RefusedError

    if row is None:
        raise RefusedError(f"--show must be the id of a rollout of {run}, got {rollout_id!r}; list them without --show")
    if as_json:
        print_json(row)
        return
    for name, value in row.items():
        if name not in ("prompt", "response") and value is not None:
            typer.echo(f"{name:15} {visible(str(value))}")
    for name in ("prompt", "response"):
        typer.echo(f"\n{name}:\n{visible(row[name] or '', 100_000)}")


def _list(found: list[dict[str, Any]], matching: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from deploy.report.text import number, visible

    table = Table(box=None, pad_edge=False)
    for name in ("rollout", "prompt", "response", "grade", "reward", "ticket", "stale"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    for row in found:
        state = row["drop_reason"] or row["state"]
        cells = (
            row["rollout_id"] or f"ticket {row['ticket_id']}",
            *((visible(row[name] or "", 200).replace("\n", "\\n")) for name in ("prompt", "response")),
            row["verdict"] or "",
            *(number(row["reward"]), state, number(row["staleness"])),
        )
        table.add_row(*map(Text, cells))  # as text: square brackets of a response are no markup
    console = Console()
    console.print(table)
    console.print(f"{len(found)} of {matching} rollouts that fit", highlight=False)
