"""What the sampled divergences are gradients of, by enumeration."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives import Recipe, build
from distrl.objectives.batch import Batch
from distrl.objectives.divergences import K2, K3, Row
from distrl.objectives.losses import Divergence
from tests.objectives.tabular import close, expected, gradient, parameters, random, token_logps


def only_kl(name: str, estimator: str) -> Recipe:
    recipe = build(name, kl_coefficient=1.0, kl_estimator=estimator)
    return replace(recipe, terms=tuple(term for term in recipe.terms if term.name == "kl"))


def kl_gradient(recipe: Recipe, logits: Tensor, behavior: Tensor, reference: Tensor, steps: int) -> Tensor:
    """Expected gradient of the KL term with y ~ behavior, the sum over tokens."""
    logps, mu = token_logps(logits, steps), token_logps(behavior, steps).detach()
    tensors = {
        "logps": logps,
        "behavior_logps": mu,
        "ref_logps": token_logps(reference, steps).detach(),
        "mask": torch.ones_like(logps, dtype=torch.bool),
        "rewards": torch.zeros(len(logps)),
        "group": torch.arange(len(logps)),
    }
    scale = steps if recipe.name == "grpo" else 1  # grpo takes the mean over tokens
    return gradient(expected(recipe, tensors, mu.sum(1).exp()).loss, logits) * scale


def local(forward: bool, logits: Tensor, states_of: Tensor, reference: Tensor) -> Tensor:
    """Gradient of sum_s d(s) KL(s) over states (the empty prefix, each first symbol) with d fixed."""
    pi, ref = logits.log_softmax(1), reference.detach().log_softmax(1)
    divergence = (ref.exp() * (ref - pi)).sum(1) if forward else (pi.exp() * (pi - ref)).sum(1)
    first = states_of.detach().softmax(1)[0]
    weights = torch.cat([torch.ones(1, dtype=torch.float64), first]) if len(logits) > 1 else torch.ones(1).double()
    return gradient((weights * divergence).sum(), logits)


@pytest.mark.parametrize("name", ["topr", "grpo"])
@pytest.mark.parametrize("steps", [1, 2])
def test_on_policy_k2_is_the_reverse_and_k3_the_forward_divergence(name: str, steps: int) -> None:
    logits, reference = parameters(3, steps, seed=1), parameters(3, steps, seed=2)
    for estimator, forward in (("k2", False), ("k3", True)):
        actual = kl_gradient(only_kl(name, estimator), logits, logits, reference, steps)
        close(actual, local(forward, logits, logits, reference))


@pytest.mark.parametrize("steps", [1, 2])
def test_off_policy_the_truncated_ratio_gives_the_divergence_on_the_behavior_policys_states(
    steps: int,
) -> None:
    logits, reference = parameters(3, steps, seed=1), parameters(3, steps, seed=2)
    behavior = (logits + 0.2 * random(*logits.shape, seed=3)).detach()
    ratio = (token_logps(logits, steps) - token_logps(behavior, steps)).exp()
    assert ratio.max() < 2.0  # the statement is exact wherever pi <= 2 mu
    for estimator, forward in (("k2", False), ("k3", True)):
        actual = kl_gradient(only_kl("topr", estimator), logits, behavior, reference, steps)
        close(actual, local(forward, logits, behavior, reference))


def test_where_the_ratio_is_truncated_it_is_the_gradient_of_its_potential() -> None:
    # k2: dG / d log pi = min(r, 2) log u. r (log u - 1) below 2; continued by log(u)^2, equal where r = 2.
    logits, reference, behavior = (parameters(3, 1, seed=seed) for seed in (11, 111, 211))
    log_pi, log_mu = logits.log_softmax(1)[0], behavior.detach().log_softmax(1)[0]
    log_ref = reference.detach().log_softmax(1)[0]
    ratio, log_u = (log_pi - log_mu).exp(), log_pi - log_ref
    assert ratio.max() > 2.0 > ratio.min()
    edge = torch.tensor(2.0).double().log() + log_mu - log_ref
    potential = torch.where(ratio <= 2, ratio * (log_u - 1), 2 * (edge - 1) + log_u**2 - edge**2)
    wanted = gradient((log_mu.exp() * potential).sum(), logits)
    close(kl_gradient(only_kl("topr", "k2"), logits, behavior, reference, 1), wanted)


def test_off_policy_without_a_weight_k3_is_neither_divergence() -> None:
    # As published: E_mu[(1 - ref / pi) grad log pi].
    logits, reference, behavior = (parameters(3, 1, seed=seed) for seed in (11, 111, 211))
    actual = kl_gradient(only_kl("grpo", "k3"), logits, behavior, reference, 1)
    log_pi = logits.log_softmax(1)[0]
    weight = behavior.softmax(1)[0] * (1 - reference.softmax(1)[0] / log_pi.exp())
    close(actual, gradient((weight.detach() * log_pi).sum(), logits))
    for forward in (False, True):
        assert (actual - local(forward, logits, behavior, reference)).abs().max() > 0.05


@pytest.mark.parametrize("row", [K2(), K3()], ids=repr)
@pytest.mark.parametrize("cap", [20.0, 1.5])
def test_the_estimator_is_the_antiderivative_of_the_score_coefficient(row: Row, cap: float) -> None:
    # Compared by central differences of the reported value, beyond the cap as well.
    log_u, h = 3 * random(500, seed=4), 1e-6

    def value(at: Tensor) -> Tensor:
        batch = Batch(torch.ones(1, 500).bool(), logps=at[None], models={"reference": torch.zeros(1, 500).double()})
        return Divergence(row, max_log_ratio=cap)(batch, torch.zeros(1, 500), torch.ones(1, 500).double())[0]

    live = log_u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(live).sum(), live)
    torch.testing.assert_close(slope, (value(log_u + h) - value(log_u - h)) / (2 * h), rtol=1e-6, atol=1e-6)
    assert value(log_u).min() >= 0


def test_k1_is_refused_because_its_gradient_is_noise() -> None:
    with pytest.raises(ConfigError) as error:
        build("topr", kl_coefficient=0.1, kl_estimator="k1")
    assert str(error.value) == (
        "topr.kl_estimator must be one of k2, k3, got 'k1': "
        "differentiated as a loss it has zero gradient in expectation and regularizes nothing; "
        "use k2, whose gradient is that of the reverse KL, or a recipe with the KL in the reward"
    )


def test_k1_as_a_loss_has_no_expected_gradient() -> None:
    logits, reference = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    log_pi, log_ref = (token_logps(x, 2).sum(1) for x in (logits, reference.detach()))
    close(gradient((log_pi.detach().exp() * (log_pi - log_ref)).sum(), logits), torch.zeros_like(logits))
