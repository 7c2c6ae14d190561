"""One command for every attempt of a run: starts it, or goes on with it. What a cluster's scheduler calls again."""

from typing import Any

from deploy.checkpoints import last_checkpoint
from deploy.progress import Progress
from deploy.report.files import read_json
from deploy.run import resume_training, run_training
from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from distrl.config import Config, dump_config
from distrl.errors import RefusedError


def resume_or_start(config: Config, progress: Progress | None = None) -> dict[str, Any]:
    """Starts the run that a config describes, or goes on with it; a finished one is left alone.

    An attempt that ended before the first checkpoint has nothing to go on with: it is put aside as NAME.abandoned-1 and
    so on, and the run begins anew.

    Returns:
        The summary.
    Raises:
        RefusedError: the run goes on in another process, or its config is another. RunError: it failed.
    """
    run_dir = RunDir(config.run_dir.absolute())
    if not run_dir.path.exists():
        return run_training(config, progress)
    if run_dir.run_json.is_file():
        state = read_state(run_dir)
        if state == RunState.RUNNING:
            raise RefusedError(f"{run_dir.path}: the run must not be running, another process runs it")
        _check_same(config, run_dir)
        if state == RunState.FINISHED:
            return read_json(run_dir.summary)
        if run_dir.ledger.is_file() and last_checkpoint(run_dir) is not None:
            return resume_training(run_dir.path, progress)
    _put_aside(run_dir)
    return run_training(config, progress)


def _check_same(config: Config, run_dir: RunDir) -> None:
    if not run_dir.config.is_file():
        return  # it ended while its directory was made
    before, now = run_dir.config.read_text().splitlines(), dump_config(config).splitlines()
    if before != now:
        changed = ", ".join([line.strip() for line in now if line not in before][:3] or ["keys are missing"])
        raise RefusedError(
            f"{run_dir.path}: a run goes on with the config it began with, got another ({changed}); choose a new "
            "run.name, or give the config of the run"
        )


def _put_aside(run_dir: RunDir) -> None:
    number = 1
    while (aside := run_dir.path.with_name(f"{run_dir.path.name}.abandoned-{number}")).exists():
        number += 1
    run_dir.path.rename(aside)
