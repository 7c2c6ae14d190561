"""Settings of the environment."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class EnvironmentConfig(BaseModel):
    """What the model talks to, over several turns; without one, a rollout is one response."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str | None = None
    """`tools`, `reasoning_gym`, `verifiers` or `module:Class` (docs/episodes.md); empty is none."""
    options: dict[str, Any] = {}
    """Arguments of the environment, such as `tools` of `tools`."""
    actors: int = Field(1, ge=1)
    """Environment actors; an episode stays in one."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds that one turn of the environment may take before its episode fails."""
    max_turns: int = Field(8, ge=1)
    """Messages of the model after which an episode ends."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """Tokens of one message; empty is what is left of `rollout.max_new_tokens`, which counts the environment's too."""
    role: Literal["user", "tool"] = "user"
    """Who speaks for the environment where `data.chat_template` is `model`."""
