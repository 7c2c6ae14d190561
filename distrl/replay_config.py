"""The config of replay, and what of the rest a run does not read that replays."""

from typing import Any

from pydantic import BaseModel, Field

from distrl.config_sections import AbsolutePath, Section


class ReplayConfig(Section):
    """Rollouts that another run has recorded, trained again."""

    journal: AbsolutePath | None = None
    """Directory of a run that has ended, or the folder `journal` in it: what its ledger names is replayed, in the order
    of its tickets; empty replays nothing."""
    ratio: float = Field(1.0, gt=0, le=1)
    """Part of the tickets of every batch that is replayed; 1 trains offline: nothing is sampled for training, and no
    actors are started for it."""
    epochs: int = Field(1, ge=1)
    """How often each recorded ticket may be replayed."""

    def per_step(self, tickets_per_step: int) -> int:
        """Replayed tickets of every batch."""
        return 0 if self.journal is None else round(self.ratio * tickets_per_step)


UNREAD_OFFLINE = {
    "generation": ("actors",),
    "train": ("max_staleness", "on_stale", "abandoned_rollouts", "logp_check_rollouts", "logp_mismatch_bound"),
    "limits": ("redraws",),
}
"""Keys that only tickets that are sampled for training read."""

UNREAD_UNSAMPLED = ("generation", "grading", "evaluation")
"""Sections that nothing reads where nothing is sampled at all."""


def check_replay(config: Any) -> None:
    """
    Args:
        config: a `distrl.config.Config`.
    Raises:
        ValueError: a key that the run would not read, or that contradicts `replay`.
    """
    replay, train = config.replay, config.train
    if replay.journal is None:
        for key in ("ratio", "epochs"):
            _check_left_out(replay, "replay", key, "replay.journal is empty: nothing is replayed", "set replay.journal")
        return
    tickets = replay.ratio * train.tickets_per_step
    if abs(tickets - round(tickets)) > 1e-6 or round(tickets) == 0:
        raise ValueError(
            f"replay.ratio must give a whole number of train.tickets_per_step ({train.tickets_per_step}), got "
            f"{replay.ratio:g}, which gives {tickets:g}; set it to a multiple of 1 / {train.tickets_per_step}"
        )
    if train.max_staleness == 0:
        raise ValueError(
            "train.max_staleness must be at least 1 where replay.journal is set, got 0; it promises that all rollouts "
            "come from the newest weights, and recorded ones do not: raise it, or leave replay out"
        )
    if replay.ratio == 1:
        _check_offline(config)


def _check_offline(config: Any) -> None:
    why = "replay.ratio is 1: nothing is sampled for training"
    for section, keys in UNREAD_OFFLINE.items():
        for key in keys:
            _check_left_out(getattr(config, section), section, key, why, "lower replay.ratio")
    if config.generation.evaluation_actors == 0:
        why = "replay.ratio is 1 and generation.evaluation_actors is 0: nothing is sampled, graded or evaluated"
        for section in UNREAD_UNSAMPLED:
            part = getattr(config, section)
            for key in type(part).model_fields:
                _check_left_out(part, section, key, why, "set generation.evaluation_actors")


def _check_left_out(section: BaseModel, name: str, key: str, why: str, remedy: str) -> None:
    default = type(section).model_fields[key].get_default(call_default_factory=True)
    value = getattr(section, key)
    if value != default:
        raise ValueError(
            f"{name}.{key} must be left out where {why}, got {value!r}; remove it (its default is {default!r}), or "
            f"{remedy}"
        )
