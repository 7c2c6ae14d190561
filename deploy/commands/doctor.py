"""`distrl doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.arguments import Json, Overrides, print_json

Config = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run to be started.")]
Run = Annotated[Path | None, typer.Option("--run", metavar="RUN", help="Directory of a run that goes on, or hangs.")]


def doctor(config: Config = None, overrides: Overrides = None, run: Run = None, as_json: Json = False) -> None:
    """Check whether CONFIG can run here, or say what a RUN waits for, with the stack of who is late.

    Example: distrl doctor examples/jsonl.yaml model.path=models/mine
    """
    from distrl.errors import RefusedError

    if (config is None) == (run is None):
        raise RefusedError("distrl doctor takes either CONFIG or --run RUN; name one of them")
    if run is not None:
        _hung(run, as_json=as_json)
    elif config is not None:
        _before(config, overrides or [], as_json=as_json)


def _before(config: Path, overrides: list[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from deploy.doctor.before import examine
    from deploy.exit_codes import EXIT_REFUSED
    from distrl.config import load_config

    findings = examine(load_config(config, overrides))
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:8} {finding.check:10} {finding.text}")
    if any(f.verdict == "bad" for f in findings):
        raise typer.Exit(EXIT_REFUSED)


def _hung(run: Path, *, as_json: bool) -> None:
    from deploy.doctor.hung import diagnose
    from deploy.run_dir import find_run

    found = diagnose(find_run(run))
    if as_json:
        processes = [{"pid": p.pid, "title": p.title, "stack": text} for p, text in found.processes]
        told = {"state": found.state, "waits": found.waits, "stage": found.stage, "do": found.remedy}
        print_json({**told, "processes": processes})
    else:
        typer.echo("\n".join(found.lines()))
