"""The journal's actor."""

from actors.journal import Journal
from deploy.remote.located import Located
from deploy.run_dir import RunDir


class JournalActor(Journal, Located):
    """`Journal` in the run's directory."""

    def __init__(self, run_dir: RunDir, budget_bytes: int | None) -> None:
        super().__init__(run_dir.journal, budget_bytes=budget_bytes)
