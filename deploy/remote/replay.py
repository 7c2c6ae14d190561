"""The replay actor."""

from actors.replay import Replay
from deploy.remote.located import Located
from distrl.storage import Folder


class ReplayActor(Replay, Located):
    """`Replay` of a recorded run's journal."""

    def __init__(self, folder: Folder, vocabulary: int) -> None:
        super().__init__(folder, vocabulary)
