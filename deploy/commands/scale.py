"""`distrl scale`."""

from typing import Annotated

import typer

from deploy.commands.arguments import RunPath


def scale(
    run: RunPath,
    generation: Annotated[int | None, typer.Option("--generation", help="Generation actors from now on.")] = None,
    grading: Annotated[int | None, typer.Option("--grading", help="Grading actors from now on.")] = None,
    learners: Annotated[int | None, typer.Option("--learners", help="Learner workers from now on.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds to wait for it to be done.")] = 120.0,
) -> None:
    """Give a running run more or fewer generation or grading actors or learner workers; returns when it is done.

    New actors load the newest weights before they sample. Those too many, the newest first, finish what they have and
    end. The learner finishes its step, makes a checkpoint and goes on from it with another number of workers.

    Example: distrl scale runs/mine --generation 3 --grading 2
    """
    from deploy.scaling import scale_run

    asked = {"generation": generation, "grading": grading, "learners": learners}
    up = scale_run(run, {stage: count for stage, count in asked.items() if count is not None}, timeout_s)
    typer.echo(f"{run}: " + ", ".join(f"{count} {stage}" for stage, count in up.items()))
