"""The files behind the ledger's checkpoints: copies of the ledger beside them, and their removal."""

import tempfile
from pathlib import Path, PurePosixPath

from distrl.errors import RunError
from distrl.ledger_reader import LedgerReader
from distrl.storage import Folder, cause


def copy_name(checkpoint: str) -> str:
    """Of the copy of the ledger that lies with a checkpoint."""
    return f"{PurePosixPath(checkpoint).name}.sqlite"


class Keeper:
    """Where the coordinator keeps what the ledger names.

    Args:
        ledgers: folder for the copies of the ledger.
    """

    def __init__(self, ledger: Path, checkpoints: Folder, ledgers: Folder) -> None:
        self._ledger = ledger
        self._checkpoints = checkpoints
        self._ledgers = ledgers

    def copy_ledger(self, checkpoint: str) -> None:
        """Puts a copy of the ledger, as it is at this moment, beside a checkpoint that it names.

        Raises:
            RunError: it cannot be written; the checkpoint is committed all the same.
        """
        name = copy_name(checkpoint)
        try:
            with tempfile.TemporaryDirectory() as directory:
                copy = Path(directory) / name
                with LedgerReader(self._ledger) as reader:
                    reader.rows("VACUUM INTO ?", str(copy))
                self._ledgers.make()
                self._ledgers.write_file(name, copy)
        except OSError as error:
            raise RunError(
                f"ledger copy {self._ledgers / name}: cannot be written: {cause(error)}; the checkpoint {checkpoint} is"
                " committed: make room or see that storage.uri can be reached, then go on with distrl resume"
            ) from error

    def remove(self, checkpoint: str) -> None:
        """Deletes a checkpoint that the ledger has given up, and the ledger's copy beside it.

        Raises:
            OSError: it could not be deleted.
        """
        (self._checkpoints / PurePosixPath(checkpoint).name).delete_folder()
        name = copy_name(checkpoint)
        if name in self._ledgers.files():
            self._ledgers.delete(name)
