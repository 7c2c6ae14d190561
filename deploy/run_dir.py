"""The directory of one run: what lies where, and how it comes about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrl.config import Config, dump_config
from distrl.errors import RefusedError, RunError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside a run's directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def metrics_history(self) -> Path:
        """Parquet files that are read as one table."""
        return self.path / "metrics.parquet"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def prometheus_targets(self) -> Path:
        """Where the run's metrics are served, while it runs.

        In one folder for all runs: Prometheus takes a `*` in the file's name only, not in its folders.
        """
        return self.path.parent / ".prometheus" / f"{self.path.name}.json"

    @property
    def live(self) -> Path:
        """What the driver last saw, while it runs; see `deploy.live`."""
        return self.path / "live.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def processes(self) -> Path:
        """Which process does what; see `deploy.process_table`."""
        return self.path / "processes.json"

    @property
    def lock(self) -> Path:
        """Locked by the driver while it runs the run."""
        return self.path / "lock"

    @property
    def stop_request(self) -> Path:
        """A file that asks the run to stop; see `distrl stop`."""
        return self.path / "stop"

    @property
    def scale_request(self) -> Path:
        """A file that asks the run for another number of processes; see `deploy.scaling`."""
        return self.path / "scale.json"

    def scale_refusal(self, asker: int) -> Path:
        """Why a request of this process was refused."""
        return self.path / f"scale.refused.{asker}"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


def create_run_dir(config: Config) -> RunDir:
    """Makes the run's directory with its resolved config.

    Raises:
        RefusedError: the directory exists already. RunError: it cannot be made.
    """
    run_dir = RunDir(config.run_dir.absolute())
    try:
        run_dir.path.mkdir(parents=True)
    except FileExistsError:
        raise RefusedError(
            f"run.name: the directory {config.run_dir} must not exist yet, a run never overwrites another; "
            f"choose a new name with run.name=... or delete it"
        ) from None
    except OSError as error:
        raise RunError(f"run.dir: {config.run_dir} cannot be made: {error.strerror}") from error
    run_dir.config.write_text(dump_config(config))
    write_json(run_dir.run_json, {"format": FORMAT, "name": config.run.name, "state": "created"})
    return run_dir


def find_run(path: Path) -> RunDir:
    """The run in this directory.

    Raises:
        RefusedError: there is none; names the newest run nearby.
    """
    run_dir = RunDir(path.absolute())
    if not path.exists():
        raise RefusedError(f"RUN: {path} must be a run directory, it does not exist; {_runs_near(path.parent)}")
    if not path.is_dir():
        raise RefusedError(f"RUN: {path} must be a run directory, it is a file; {_runs_near(path.parent)}")
    if not run_dir.run_json.is_file():
        raise RefusedError(f"RUN: {path} must be a run directory, it has no run.json; {_runs_near(path)}")
    return run_dir


def _runs_near(folder: Path) -> str:
    runs = sorted(folder.glob("*/run.json"), key=lambda p: (p.stat().st_mtime, p)) if folder.is_dir() else []
    if not runs:
        return "give the folder that `distrl train` made, such as runs/NAME"
    return f"did you mean {runs[-1].parent}?"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file so that a reader sees the old content or the new one, never half."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    aside.replace(path)
