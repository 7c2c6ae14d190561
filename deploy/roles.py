"""Which generation actors sample for which role, and from which weights; imports no torch."""

from distrl.config import Config
from distrl.schema import Role
from distrl.tickets import weights_of

GENERATION_STAGES = {
    Role.POLICY: "generation",
    Role.EVALUATION: "evaluation",
    Role.REFERENCE: "reference-sampling",
    Role.OPPONENT: "opponent",
}
"""By role, what the generation actors are called that sample for it."""


def own_actors(config: Config) -> dict[Role, int]:
    """Generation actors that sample for one role alone; 0 where it shares those that sample for training."""
    g = config.generation
    return {
        Role.EVALUATION: g.evaluation_actors,
        Role.REFERENCE: g.reference_actors,
        Role.OPPONENT: g.opponent_actors,
    }


def weights_by_role(config: Config, samples: frozenset[Role]) -> dict[Role, tuple[str, ...]]:
    """By the role whose generation actors they are, the names of the weights that these hold."""
    own = own_actors(config)
    shared = {weights_of(role) for role in samples if not own.get(role)}
    apart = {role: (weights_of(role),) for role in sorted(samples) if own.get(role)}
    # A run that only replays samples for no training; what it evaluates has actors of its own.
    main = {Role.POLICY: tuple(sorted({weights_of(Role.POLICY)} | shared))} if Role.POLICY in samples else {}
    return {**main, **apart}


def generation_actors(config: Config, samples: frozenset[Role]) -> dict[Role, int]:
    """Generation actors by the role whose they are; those of the policy also sample for roles without any."""
    counts = {Role.POLICY: config.generation.actors, **own_actors(config)}
    return {role: counts[role] for role in weights_by_role(config, samples)}


def generation_counts(config: Config, samples: frozenset[Role]) -> dict[str, int]:
    """Generation actors by stage."""
    return {GENERATION_STAGES[role]: count for role, count in generation_actors(config, samples).items()}


def weights_of_stage(config: Config, samples: frozenset[Role], stage: str) -> tuple[str, ...] | None:
    """The weights that generation actors of a stage hold; None for another stage."""
    by_stage = {GENERATION_STAGES[role]: weights for role, weights in weights_by_role(config, samples).items()}
    return by_stage.get(stage)
