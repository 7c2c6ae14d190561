"""The command line; most commands have a module of their own in `deploy.commands`."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from deploy.commands.arguments import (
    AllowUnsandboxed,
    ConfigPath,
    Json,
    Overrides,
    RunPath,
    print_json,
    with_sandbox,
)
from deploy.commands.audit import audit
from deploy.commands.compact import compact
from deploy.commands.doctor import doctor
from deploy.commands.evaluate import evaluate
from deploy.commands.export import export
from deploy.commands.init import init, schema
from deploy.commands.k8s import k8s
from deploy.commands.look import rollouts, ui
from deploy.commands.recipes import recipes
from deploy.commands.scale import scale
from deploy.commands.vstar import vstar
from deploy.exit_codes import EXIT_INTERRUPTED, exit_code
from distrl.errors import DistrlError

app = typer.Typer(
    help="RL post-training of language models with asynchronous actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # else lines break where the source breaks them
)


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Train a tiny model to sort digits, on this machine, in a few minutes.

    Makes the model and warms it up by supervised steps (cached), then runs asynchronous RL.

    Example: distrl quickstart run.name=first train.steps=30
    """
    from deploy.quickstart import run_quickstart

    run_quickstart(overrides or [], Console())


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_unsandboxed: AllowUnsandboxed = False,
    again: Annotated[
        bool, typer.Option("--resume-or-start", help="Go on with the run if it is there and has the same config.")
    ] = False,
) -> None:
    """Run the training that CONFIG describes.

    Example: distrl train examples/sort_digits.yaml model.path=models/mine train.steps=20
    """
    import deploy

    given = with_sandbox(overrides, allow_unsandboxed)
    if not again:
        deploy.train(config, given)
        return
    from deploy.attempt import resume_or_start
    from deploy.progress import Terminal
    from distrl.config import load_config

    made = load_config(config, given)
    resume_or_start(made, Terminal(Console(), made.train.steps, made.run.name))


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None, allow_unsandboxed: AllowUnsandboxed = False) -> None:
    """Check CONFIG and say in words what it would run; starts nothing.

    Example: distrl validate examples/sort_digits.yaml model.path=models/mine
    """
    from deploy.check import check_run
    from deploy.explain import explain
    from distrl.config import load_config

    loaded = load_config(config, with_sandbox(overrides, allow_unsandboxed))
    for line in explain(loaded, check_run(loaded)):
        typer.echo(line)


@app.command()
def resume(
    run: RunPath,
    storage: Annotated[
        str | None, typer.Option("--storage", help="The storage.uri of a run whose directory is lost.")
    ] = None,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint.

    Where the run's directory is lost and the run has a storage.uri, --storage puts it back first, from the newest copy
    of the ledger there: what was trained after its checkpoint is lost and done again.

    Example: distrl resume runs/mine
    """
    if storage is not None:
        from deploy.put_back import put_back

        found = put_back(run, storage)
        typer.echo(
            f"{run}: put back from the ledger's copy beside {found.checkpoint.path}; {found.lost_files} journal files "
            "that came later are lost, and their rollouts are sampled again"
        )
    from deploy.progress import Terminal
    from deploy.run import resumable, resume_training

    config, _, _ = resumable(run)
    resume_training(run, Terminal(Console(), config.train.steps, config.run.name))


@app.command()
def stop(
    run: RunPath,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds to wait for the run to end.")] = 120.0,
) -> None:
    """Stop a run after the step under way, with a checkpoint; returns when it has ended. Ctrl-C does the same.

    Example: distrl stop runs/mine
    """
    from deploy.control import stop_run

    typer.echo(f"{run}: {stop_run(run, timeout_s)}")


@app.command()
def status(run: RunPath, as_json: Json = False) -> None:
    """Say how a run is doing: state, step, reward, held-out accuracy, tickets. Needs no Ray.

    Example: distrl status runs/mine --json
    """
    from deploy.control import describe, run_status

    found = run_status(run)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(describe(found)))


@app.command()
def report(run: RunPath, as_json: Json = False) -> None:
    """Write RUN/report.html, one page that needs no network, and its numbers as RUN/report/*.parquet.

    Example: distrl report runs/quickstart
    """
    from deploy.report.write import write_report

    written = write_report(run)
    if as_json:
        print_json(written.as_json())
        return
    typer.echo(f"{written.page}: {written.sentence()}")
    typer.echo(f"{written.page.with_name('report')}: {', '.join(p.name for p in written.tables.values())}")
    for note in written.data.facts.missing:
        typer.echo(f"missing: {note}")


app.command()(audit)
app.command()(compact)
app.command("eval")(evaluate)
app.command()(export)
app.command()(init)
app.command()(schema)
app.command()(recipes)
app.command()(ui)
app.command()(rollouts)
app.add_typer(k8s, name="k8s")
app.command()(doctor)
app.command()(vstar)
app.command()(scale)


def main() -> None:
    """Entry point of the `distrl` command; `deploy.exit_codes` says what the exit status means."""
    from deploy.guard import check_packages
    from distrl.rewards import importable_from

    try:
        check_packages()
        importable_from(os.getcwd())
        app(standalone_mode=True)
    except DistrlError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(exit_code(error))
    except SystemExit as ended:
        # Typer turns Ctrl-C into this status, and says nothing.
        if ended.code == EXIT_INTERRUPTED:
            typer.echo("interrupted", err=True)
        raise
