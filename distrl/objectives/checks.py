"""What is refused before anything runs: a combination that would train something else than it says."""

from distrl.errors import ConfigError
from distrl.objectives.baselines import Constant, GroupStd, One, smallest_group
from distrl.objectives.credit import Credit
from distrl.objectives.losses import Divergence, Regression, Score
from distrl.objectives.pairs import IPO
from distrl.objectives.recipe import Recipe, Term
from distrl.objectives.regularized import Regularized
from distrl.objectives.roles import producer
from distrl.objectives.tapers import SignedTruncate


def check(
    recipe: Recipe,
    *,
    lowest_reward: float | None = None,
    group_size: int | None = None,
    produced: frozenset[str] | None = None,
) -> None:
    """Refuse a combination that would train something else than it says, before anything runs.

    Args:
        lowest_reward: smallest reward that the graders can give; None where it is unbounded or unknown.
        group_size: responses per ticket.
        produced: models and columns that the run produces, as in `required_columns`.

    Raises:
        ConfigError: the recipe contradicts itself (see `check_composition`); no credit could be negative under
            a taper that gives credits >= 0 a constant weight, which is supervised training on good responses;
            groups of one under a group baseline, whose credit is always 0; or something that the recipe reads
            is not produced.
    """
    check_composition(recipe)
    baseline = recipe.credit.baseline
    if lowest_reward is not None and isinstance(baseline, Constant) and baseline.value <= lowest_reward:
        for shape in (ratio.shape for term in recipe.terms for ratio in term.ratios):
            if isinstance(shape, SignedTruncate) and shape.a_plus == shape.b_plus:
                raise ConfigError(
                    f"{recipe.name}.baseline must be > the lowest reward {lowest_reward}, "
                    f"got {baseline.value}; "
                    "else no response is pushed down (supervised training on the others): "
                    "use 0.5 for rewards in {0, 1}, or rewards in {-1, 1} with baseline 0"
                )
    smallest = smallest_group(baseline)
    if group_size is not None and group_size < smallest:
        raise ConfigError(
            f"{recipe.name} needs a group size >= {smallest}, got {group_size}; "
            "a response alone in its group is its own mean and has credit 0: sample more responses per prompt"
        )
    missing = sorted(recipe.needs - produced) if produced is not None else []
    if missing:
        raise ConfigError(
            f"{recipe.name} reads {', '.join(f'{name} (from the {producer(name)})' for name in missing)}, "
            "which this run does not produce; "
            "turn on what produces it, or the option off that reads it (kl_coefficient: 0 for the reference)"
        )


def check_composition(recipe: Recipe) -> None:
    """Refuse what no data could make right.

    Raises:
        ConfigError: a divergence from the policy itself, a ratio that is corrected twice, a KL inside a credit
            that is standardized, a return of the single token under a baseline of whole responses, or a
            field that the loss of a pair or of a whole response would not read.
    """
    _check_credit(recipe.name, recipe.credit)
    if all(term.loss.unit == "pair" for term in recipe.terms) and recipe.credit.rewards:
        raise ConfigError(
            f"{recipe.name}.credit has rewards, but losses of pairs read no credit; write credit: {{rewards: []}}"
        )
    for term in recipe.terms:
        _check_anchor(recipe.name, term)
        _check_correction(recipe.name, term)
        _check_unit(recipe.name, term)
    for penalty in recipe.credit.penalties:
        if penalty.over.keys() <= {"policy"}:
            raise ConfigError(
                f"{recipe.name}.credit has a penalty over {dict(penalty.over)}, the policy itself; "
                "its gradient is zero in expectation, so that it regularizes nothing: name another model"
            )


def _check_credit(name: str, credit: Credit) -> None:
    if credit.penalties and not isinstance(credit.scale, One) and not credit.scale_includes_kl:
        raise ConfigError(
            f"{name}.credit has a KL in the reward and a scale, which would divide the KL's coefficient by the "
            "standard deviation of the returns; put the KL into the loss, use scale: one, "
            "or say scale_includes_kl: true (the metric effective_kl_coefficient has what is left of it)"
        )
    grouped = smallest_group(credit.baseline) > 1 or isinstance(credit.scale, GroupStd)
    if grouped and not credit.returns.of_response:
        raise ConfigError(
            f"{name}.credit compares whole responses of a group, but its return is that of single tokens; "
            "use the return whole or to_go, or a baseline per token (constant, value, batch_mean)"
        )


def _check_anchor(name: str, term: Term) -> None:
    if isinstance(term.loss, Divergence | Regression | IPO) and term.loss.anchor.keys() <= {"policy"}:
        raise ConfigError(
            f"{name}.terms.{term.name} measures the policy against {dict(term.loss.anchor)}, itself; "
            "its gradient is zero in expectation, so that it regularizes nothing: name another model"
        )


def _check_unit(name: str, term: Term) -> None:
    """Losses of pairs and of whole responses cannot be weighted or averaged like losses of tokens."""
    where = f"{name}.terms.{term.name}"
    if term.loss.unit == "pair":
        ignored = {"weights": term.weights, "where": term.where, "self_normalize": term.self_normalize}
        ignored["per"] = term.per != "token"
        for field, given in ignored.items():
            if given:
                raise ConfigError(
                    f"{where}.{field} is given, but a loss of pairs is the plain mean over pairs of the policy's own; "
                    "leave it out"
                )
    whole = isinstance(term.loss, Regression) or (
        isinstance(term.loss, Regularized) and term.loss.ratio.level == "sequence"
    )
    if whole and term.per != "sequence_sum":
        raise ConfigError(
            f"{where}.per must be sequence_sum, got {term.per}; "
            "the loss is that of a whole response, and anything else would divide it by the response's length"
        )
    if whole and any(ratio.level in ("token", "prefix") for ratio in term.ratios):
        raise ConfigError(
            f"{where} weighs the loss of a whole response with a ratio of single tokens; use level: sequence"
        )


def _check_correction(name: str, term: Term) -> None:
    """A product of ratios may carry the policy at most once, and divide by the behavior policy at most once."""
    if not isinstance(term.loss, Score):
        return
    exponents: dict[str, float] = {}
    for ratio in term.ratios:
        for model, power in [*ratio.of.items(), *((model, -power) for model, power in ratio.over.items())]:
            exponents[model] = exponents.get(model, 0.0) + power
    if exponents.get("policy", 0.0) > 1.0 or exponents.get("behavior", 0.0) < -1.0:
        raise ConfigError(
            f"{name}.terms.{term.name} corrects its importance ratio twice, its weights multiply to "
            f"{' '.join(f'{model}^{power:g}' for model, power in exponents.items() if power)}; "
            "a ratio of policy over behavior is the whole correction: leave one weight out, "
            "or take the ratios policy over proximal and proximal over behavior"
        )
