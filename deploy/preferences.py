"""What a run that compares responses needs, checked before it starts."""

from distrl.config import Config
from distrl.config_sections import PreferenceConfig
from distrl.errors import ConfigError
from distrl.judges import check_judge
from distrl.objectives import Recipe
from distrl.objectives.upkeep import Mixture
from distrl.preferences import REWARD_DIFFERENCE, SETTING


def check_preference(config: Config, recipe: Recipe) -> int:
    """How many opponents each response meets; 0 where a ticket's responses are compared in pairs, or nothing is.

    Raises:
        ConfigError: the objective compares responses and the config does not say how, or the other way round; a pair
            has no second response; opponents are asked for that the engine cannot sample.
    """
    compared = config.preference
    reads = recipe.needs & {"preference", "pair_preference"}
    if not reads:
        if compared.function is not None:
            raise ConfigError(
                f"preference.function must be empty for objective.recipe {recipe.name}, got {compared.function!r}; "
                "nothing reads preferences: remove it, or choose the recipe nash_mp or online_ipo"
            )
        return 0
    if compared.function is None:
        raise ConfigError(
            f"preference.function is required for objective.recipe {recipe.name}, which compares responses; set it to "
            "reward_difference, a judge, or module:function"
        )
    _check_function(compared)
    size = config.rollout.group_size
    if "preference" not in reads:
        return _check_pairs(config, recipe, size)
    for name, kept in recipe.upkeep.items():
        if isinstance(kept, Mixture) and config.generation.engine == "vllm":
            raise ConfigError(
                f"generation.engine must be transformers for objective.recipe {recipe.name}, whose {name} "
                f"{kept.describe()}, got vllm; a vLLM samples from one model alone: change the engine, or use nash_mp, "
                "whose opponents are an average or a snapshot of the policy's weights"
            )
    if compared.opponents > size:
        raise ConfigError(
            f"preference.opponents must be <= rollout.group_size ({size}), got {compared.opponents}; a ticket has as "
            "many opponents as responses"
        )
    return compared.opponents


def _check_function(compared: PreferenceConfig) -> None:
    """Refuses what the chosen comparison would not read."""
    if compared.function != REWARD_DIFFERENCE:
        check_judge(str(compared.function), compared.options, setting=SETTING)
        unread, why = ["scale"], f"only {REWARD_DIFFERENCE} is scaled"
    else:
        unread, why = ["options", "symmetrize", "parallel"], "a difference of rewards takes none"
    for name in unread:
        value, default = getattr(compared, name), PreferenceConfig.model_fields[name].default
        if value != default:
            raise ConfigError(
                f"preference.{name} must be left out with preference.function {compared.function}, got {value!r}; {why}"
            )


def _check_pairs(config: Config, recipe: Recipe, size: int) -> int:
    if size % 2:
        raise ConfigError(
            f"rollout.group_size must be even for objective.recipe {recipe.name}, got {size}; the "
            "responses of a ticket are compared in pairs"
        )
    if config.train.max_staleness > 0 or config.train.on_stale == "keep":
        raise ConfigError(
            f"train.max_staleness must be 0 and train.on_stale wait for objective.recipe {recipe.name}, got "
            f"{config.train.max_staleness} and {config.train.on_stale}; both responses of a pair play for the policy "
            "itself, and older ones would make older weights the opponent"
        )
    return 0
