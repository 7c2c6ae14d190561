"""The grading actor."""

from actors.grading import Grading
from deploy.remote.located import Located
from distrl.config import Config
from distrl.graders.build import Graders, build_graders, describe, resources
from distrl.graders.registry import importable_from


class GradingActor(Grading, Located):
    """`Grading` with the run's graders.

    Args:
        folder: where the run was started; a grader of the user's own may be a module there.
    """

    def __init__(self, config: Config, graders: Graders, folder: str) -> None:
        importable_from(folder)
        concurrency = config.grading.concurrency
        grader = build_graders(graders, concurrency, resources(config))
        super().__init__(" ".join(filter(None, [describe(graders), grader.version])), grader, concurrency)
