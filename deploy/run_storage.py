"""Where a run keeps its journal, its checkpoints and the copies of its ledger: its directory, or `storage.uri`."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from deploy.run_dir import RunDir
from distrl.errors import RunError
from distrl.storage import Folder


@dataclass(frozen=True, slots=True)
class RunStorage:
    """The folders of one run."""

    folder: Folder
    apart: bool
    """Whether it is another place than the run's directory."""

    @property
    def journal(self) -> Folder:
        return self.folder / "journal"

    @property
    def checkpoints(self) -> Folder:
        return self.folder / "checkpoints"

    @property
    def ledgers(self) -> Folder:
        """A copy of the ledger with each checkpoint, named as the checkpoint is."""
        return self.folder / "ledgers"

    def checkpoint(self, path: str) -> Folder:
        """A checkpoint that the ledger names; by its name, as the run may have been moved."""
        return self.checkpoints / PurePosixPath(path).name


def storage_at(uri: str | None, run_dir: RunDir) -> RunStorage:
    """The storage of a run.

    Args:
        uri: `storage.uri`.
    """
    if uri is None:
        return RunStorage(Folder(run_dir.path), apart=False)
    return RunStorage(Folder(uri) / run_dir.path.name, apart=True)


def run_storage(run_dir: RunDir) -> RunStorage:
    """The storage of a run that is there.

    Raises:
        RunError: its config cannot be read.
    """
    # Not load_config: a config with masked secrets, or of another version, still says where the run's files are.
    try:
        config = yaml.safe_load(run_dir.config.read_text())
    except FileNotFoundError:
        return storage_at(None, run_dir)
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{run_dir.config}: must be readable ({error!r}); restore it") from error
    section = config.get("storage") if isinstance(config, dict) else None
    return storage_at(section.get("uri") if isinstance(section, dict) else None, run_dir)


def sending(run_dir: RunDir) -> Path:
    """Where a checkpoint is made that is sent to a storage apart."""
    return run_dir.path / "sending"
