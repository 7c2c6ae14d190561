"""`distrl eval`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.arguments import AllowUnsandboxed, ConfigPath, Json, Overrides, print_json, with_sandbox

if TYPE_CHECKING:
    from deploy.evaluate import Advance

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face directory: an export, a checkpoint, any.")]
Samples = Annotated[int, typer.Option(min=1, help="Responses per problem.")]
Ks = Annotated[list[int] | None, typer.Option("--k", help="A k of pass@k; repeatable. Without it 1, 2, 4, ...")]
More = Annotated[
    list[str] | None,
    typer.Option("--heldout", metavar="NAME=FILE", help="One more held-out set, a JSONL file; repeatable."),
]


def evaluate(
    model: Model,
    config: ConfigPath,
    overrides: Overrides = None,
    samples: Samples = 1,
    k: Ks = None,
    heldout: More = None,
    as_json: Json = False,
    allow_unsandboxed: AllowUnsandboxed = False,
) -> None:
    """Measure MODEL on the held-out problems of CONFIG, and on others: accuracy and pass@k with 95% intervals.

    Samples evaluation.problems problems at rollout.temperature in this process, with one model and the graders;
    nothing is trained and no run is touched. model.path is MODEL, whatever CONFIG says.

    Example: distrl eval runs/mine/exports/step-000020 mine.yaml --samples 8 --heldout hard=data/hard.jsonl
    """
    from deploy.evaluate import evaluate_model
    from distrl.config import load_config

    loaded = load_config(config, [*with_sandbox(overrides, allow_unsandboxed), f"model.path={json.dumps(str(model))}"])
    with _progress() as advance:
        found = evaluate_model(loaded, heldout or [], samples, k or [], advance)
    for one in found["sets"]:
        if one["failed"]:
            typer.echo(f"{one['name']}: {one['failed']} problems failed: {one['first_failure']}", err=True)
    if as_json:
        print_json(found)
    else:
        for line in _lines(found):
            typer.echo(line)


@contextmanager
def _progress() -> Iterator["Advance"]:
    """A bar per set on a terminal, elsewhere a line per tenth of a set; on the error stream."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield advance


def _plain(name: str, done: int, total: int) -> None:
    if done * 10 // total != (done - 1) * 10 // total:
        typer.echo(f"{name}: {done} of {total} problems", err=True)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{found['model']}: {found['samples']} response(s) per problem at temperature {found['temperature']:g}, up to "
        f"{found['max_new_tokens']} tokens; 95% intervals in brackets"
    )
    for one in found["sets"]:
        yield f"{one['name']}: {one['problems']} problems, {one['failed']} failed, graded by {one['grader']}"
        yield f"    accuracy   {_interval(one['accuracy'])}"
        for k, estimate in one["pass_at_k"].items():
            yield f"    {'pass@' + k:<10} {_interval(estimate)}"
        yield f"    reward     {one['reward_mean']:.4f}"
        yield f"    tokens     {one['response_tokens_mean']:.1f} per response, {one['cut_share']:.1%} of responses cut"


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4f}  [{estimate['low']:.4f}, {estimate['high']:.4f}]"
