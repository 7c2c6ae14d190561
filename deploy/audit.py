"""Audits a run by its directory: config, ledger, journal and checkpoints. Needs no Ray, and writes nothing."""

from pathlib import Path
from typing import Any

import yaml

from deploy.run_dir import RunDir, find_run
from deploy.run_state import RunState, read_state
from deploy.run_storage import run_storage
from distrl.audit import Audit, Contract, audit
from distrl.errors import RefusedError, RunError
from distrl.replay_config import ReplayConfig


def audit_run(path: Path) -> Audit:
    """Audits a run, which may go on meanwhile.

    Raises:
        RefusedError: there is no such run, or it has no ledger yet. LedgerError, RunError: it cannot be read.
    """
    run_dir = find_run(path)
    if not run_dir.ledger.is_file():
        raise RefusedError(f"{path}: the run must have a ledger to be audited; it ended before it had begun")
    storage = run_storage(run_dir)
    return audit(
        run_dir.ledger,
        _contract(run_dir),
        storage.journal,
        lambda name: storage.checkpoint(name).sha256(),
    )


def _contract(run_dir: RunDir) -> Contract:
    # Not load_config: a config with masked secrets cannot be run again, but its run can be audited.
    try:
        config: dict[str, Any] = yaml.safe_load(run_dir.config.read_text())
        train = config["train"]
        replay = ReplayConfig.model_validate(config.get("replay", {}))  # nor this section
        return Contract(
            tickets_per_step=train["tickets_per_step"],
            max_staleness=None if train["on_stale"] == "keep" else train["max_staleness"],
            finished=read_state(run_dir) == RunState.FINISHED,
            drop_abandoned=train.get("abandoned_rollouts") == "drop",  # runs of before have no such key
            redraws=config["limits"]["redraws"] if train["on_stale"] == "redraw" else 0,
            replays_per_step=replay.per_step(train["tickets_per_step"]),
            replay_epochs=replay.epochs,
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run_dir.config}: must be readable, with a section train ({error!r}); restore it") from error
