"""One command for every attempt of a run: starts it, or goes on with it. What a cluster's scheduler calls again."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from deploy.progress import Progress
from deploy.put_back import is_kept_apart, put_back
from deploy.report.files import read_json
from deploy.run import resume_training, run_training
from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from distrl.config import Config, dump_config
from distrl.errors import RefusedError


def resume_or_start(config: Config, progress: Progress | None = None) -> dict[str, Any]:
    """Starts the run that a config describes, or goes on with it; a finished one is left alone.

    An attempt that ended before its first checkpoint goes on from the weights that it began with, and keeps what it
    had sampled. A directory that is lost is put back from `storage.uri`, where the run has one. One that was not even
    complete is put aside as NAME.abandoned-1 and so on.

    Returns:
        The summary.
    Raises:
        RefusedError: the run goes on in another process, or its config is another. RunError: it failed.
    """
    run_dir = RunDir(config.run_dir.absolute())
    if not run_dir.path.exists() and is_kept_apart(config):
        put_back(run_dir.path, str(config.storage.uri))
    if not run_dir.path.exists():
        return run_training(config, progress)
    if run_dir.run_json.is_file():
        state = read_state(run_dir)
        if state == RunState.RUNNING:
            raise RefusedError(f"{run_dir.path}: the run must not be running, another process runs it")
        _check_same(config, run_dir)
        if state == RunState.FINISHED:
            return read_json(run_dir.summary)
        return resume_training(run_dir.path, progress, config)
    _put_aside(run_dir)
    return run_training(config, progress)


def _check_same(config: Config, run_dir: RunDir) -> None:
    """Secrets are masked on both sides: one that was changed, because it had expired, is no other config."""
    before = dict(_flat(yaml.safe_load(run_dir.config.read_text())))
    now = dict(_flat(yaml.safe_load(dump_config(config))))
    differing = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise RefusedError(
            f"{key}: a run goes on with the config it began with, {run_dir.path} has {before.get(key, _ABSENT)}, got "
            f"{now.get(key, _ABSENT)}{more}; give the run's config, or choose a new run.name"
        )


_ABSENT = "no such key"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put_aside(run_dir: RunDir) -> None:
    number = 1
    while (aside := run_dir.path.with_name(f"{run_dir.path.name}.abandoned-{number}")).exists():
        number += 1
    run_dir.path.rename(aside)
