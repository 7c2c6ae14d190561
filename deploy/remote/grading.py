"""The grading actor."""

from actors.grading import Grading
from deploy.remote.located import Located
from distrl.config import Config
from distrl.graders.build import Graders, build_graders, describe, resources
from distrl.graders.registry import importable_from
from distrl.preferences import Comparison, make_comparison


def run_comparison(config: Config) -> Comparison | None:
    """What compares the run's responses, where something does."""
    return None if config.preference.function is None else make_comparison(config.preference)


class GradingActor(Grading, Located):
    """`Grading` with the run's graders.

    Args:
        folder: where the run was started; a grader of the user's own may be a module there.
        opponents: that each response is compared with; 0 compares pairs of a ticket, where something is compared.
    """

    def __init__(self, config: Config, graders: Graders, folder: str, opponents: int = 0) -> None:
        importable_from(folder)
        concurrency = config.grading.concurrency
        grader = build_graders(graders, concurrency, resources(config))
        super().__init__(
            " ".join(filter(None, [describe(graders), grader.version])),
            grader,
            concurrency,
            comparison=run_comparison(config),
            opponents=opponents,
        )
