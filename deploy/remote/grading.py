"""The grading actor."""

from actors.grading import Grading
from distrl.config import Config
from distrl.rewards import make_grader


class GradingActor(Grading):
    """`Grading` with the run's grader."""

    def __init__(self, config: Config, grader_name: str) -> None:
        super().__init__(grader_name, make_grader(grader_name), config.grading.concurrency)
