"""The journal's actor."""

from actors.journal import Journal
from deploy.remote.located import Located
from distrl.storage import Folder


class JournalActor(Journal, Located):
    """`Journal` in the run's storage."""

    def __init__(self, folder: Folder, budget_bytes: int | None) -> None:
        super().__init__(folder, budget_bytes=budget_bytes)
