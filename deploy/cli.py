"""The command line: `distrl quickstart | train | resume | stop | status | report | validate`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distrl.errors import ConfigError, DataError, DistrlError

app = typer.Typer(
    help="RL post-training of language models with asynchronous actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_FAILED = 1
EXIT_REFUSED = 2
"""The config or the data cannot be used; nothing was started."""
EXIT_INTERRUPTED = 130

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as train.steps=20."),
]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")]


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Train a tiny model to sort digits, on this machine, in a few minutes.

    Makes the model and warms it up by supervised steps (cached), then runs asynchronous RL.

    Example: distrl quickstart run.name=first train.steps=30
    """
    from deploy.quickstart import run_quickstart

    run_quickstart(overrides or [], Console())


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the training that CONFIG describes.

    Example: distrl train examples/sort_digits.yaml model.path=models/mine train.steps=20
    """
    from deploy.progress import Terminal
    from deploy.run import run_training
    from distrl.config import load_config

    loaded = load_config(config, overrides or [])
    run_training(loaded, Terminal(Console(), loaded.train.steps, loaded.run.name))


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG and say in words what it would run; starts nothing.

    Example: distrl validate examples/sort_digits.yaml model.path=models/mine
    """
    from deploy.check import check_run, explain
    from distrl.config import load_config

    loaded = load_config(config, overrides or [])
    for line in explain(loaded, check_run(loaded)):
        typer.echo(line)


@app.command()
def resume(run: RunPath) -> None:
    """Go on with a run that was stopped, from its last checkpoint.

    Example: distrl resume runs/mine
    """
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
def status(
    run: RunPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON for another program.")] = False
) -> None:
    """Say how a run is doing: state, step, reward, held-out accuracy, tickets. Needs no Ray.

    Example: distrl status runs/mine --json
    """
    from deploy.control import describe, run_status

    found = run_status(run)
    typer.echo(json.dumps(found) if as_json else "\n".join(describe(found)))


@app.command()
def report(
    run: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and headline numbers as JSON.")] = False,
) -> None:
    """Write RUN/report.html, one page that needs no network, and its numbers as RUN/report/*.parquet.

    Example: distrl report runs/quickstart
    """
    from deploy.report.write import write_report

    written = write_report(run)
    if as_json:
        typer.echo(json.dumps(written.as_json(), indent=2))
        return
    typer.echo(f"{written.page}: {written.sentence()}")
    typer.echo(f"{written.page.with_name('report')}: {', '.join(p.name for p in written.tables.values())}")
    for note in written.data.facts.missing:
        typer.echo(f"missing: {note}")


def main() -> None:
    """Entry point of the `distrl` command. Exit status 0: done; 1: the run failed; 2: refused; 130: interrupted."""
    from deploy.guard import check_packages

    try:
        check_packages()
        app(standalone_mode=True)
    except (ConfigError, DataError) as error:
        _say(error)
        sys.exit(EXIT_REFUSED)
    except DistrlError as error:
        _say(error)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _say(error: DistrlError) -> None:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
