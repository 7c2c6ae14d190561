"""Settings of one grader."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from distrl.errors import ConfigError


class GraderConfig(BaseModel):
    """One of several graders, under `reward.graders.NAME`; NAME is the component of its reward."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    grader: str | None = None
    """Which grader, as in `reward.grader`; empty takes NAME."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor of its reward in the sum; 0 records it only."""
    timeout_s: float | None = Field(None, gt=0)
    """Seconds that it may take for a ticket's responses, or for one response where it has processes of its own; empty
    is 60, for `math_verify` 10."""
    attempts: int = Field(1, ge=1)
    """Calls that may fail before the ticket's grading counts as failed, which is tried `limits.call_attempts` times."""
    concurrency: int | None = Field(None, ge=1)
    """Tickets that it grades at a time in one actor; empty is `grading.concurrency`."""
    processes: int | None = Field(None, ge=0)
    """Processes of its own in each grading actor, which are killed and replaced at the time limit, for a grader that
    may hang; 0 uses threads. Empty is 0, for `math_verify` 2."""
    cache: int | None = Field(None, ge=0)
    """Grades that one actor keeps, by problem, response and version; 0 keeps none. Empty is 10,000 for the built-in
    graders that depend on nothing else, and 0 for others."""
    version: str = ""
    """Of a grader of your own; part of a kept grade's key."""
    range: tuple[float, float] | None = None
    """Lowest and highest reward; one outside is a failure. Empty is the range that a built-in grader has."""
    options: dict[str, Any] = {}
    """Arguments of the grader, such as `pattern` of `regex`."""

    def named(self, name: str) -> str:
        """The grader that is used under this name."""
        return self.grader or name


def check_names(graders: dict[str, GraderConfig], grader: str | None) -> None:
    """
    Raises:
        ConfigError: `reward.grader` and `reward.graders` are both set, or a range is empty.
    """
    if graders and grader is not None:
        raise ConfigError(
            f"reward.grader must be empty where reward.graders is set, got {grader!r}; remove one of the two"
        )
    for name, one in graders.items():
        if one.range is not None and not one.range[0] <= one.range[1]:
            raise ConfigError(
                f"reward.graders.{name}.range must go from the lowest to the highest reward, got {list(one.range)}; "
                "swap them"
            )
