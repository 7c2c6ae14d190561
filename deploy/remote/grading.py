"""The grading actor."""

from actors.grading import Grading
from deploy.remote.located import Located
from distrl.config import Config
from distrl.rewards import importable_from, make_grader


class GradingActor(Grading, Located):
    """`Grading` with the run's grader.

    Args:
        folder: where the run was started; a grader of the user's own may be a module there.
    """

    def __init__(self, config: Config, grader_name: str, folder: str) -> None:
        importable_from(folder)
        super().__init__(grader_name, make_grader(grader_name), config.grading.concurrency)
