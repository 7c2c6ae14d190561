"""f-divergences: values by definition, gradients by enumeration, limits and optima in closed form."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives import Batch, Recipe, build, compute
from distrl.objectives.divergences import (
    K2,
    K3,
    Alpha,
    ChiSquared,
    ForwardKL,
    Hellinger,
    JensenShannon,
    ReverseKL,
    Row,
    TotalVariation,
    Tsallis,
    fold,
)
from distrl.objectives.losses import Divergence, FullDivergence
from distrl.objectives.ratios import Ratio
from distrl.objectives.tapers import Truncate
from tests.objectives.tabular import close, expected, gradient, parameters, random, responses, token_logps

F = {
    K2(): lambda u: u * u.log(),
    K3(): lambda u: -u.log(),
    ReverseKL(True): lambda u: u * u.log(),
    ForwardKL(True): lambda u: -u.log(),
    JensenShannon(): lambda u: 0.5 * (u * u.log() - (u + 1) * ((u + 1) / 2).log()),
    Hellinger(): lambda u: 0.5 * (u.sqrt() - 1) ** 2,
    ChiSquared(): lambda u: (u - 1) ** 2,
    TotalVariation(): lambda u: 0.5 * (u - 1).abs(),
    Alpha(0.3): lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
    Tsallis(1.7): lambda u: u * (u**0.7 - 1) / 0.7,
    Tsallis(0.4): lambda u: u * (u**-0.6 - 1) / -0.6,
}
"""f as the definition has it, without the shift by f'(1) (u - 1)."""

NAMED = {"k2": K2(), "k3": K3(), "js": JensenShannon(), "hellinger": Hellinger(), "tv": TotalVariation()}

each_row = pytest.mark.parametrize("row", list(F), ids=repr)


def definition(row: Row, logits: Tensor, reference: Tensor) -> Tensor:
    """[states] D_f(pi || ref) of each state's distribution."""
    pi, ref = logits.softmax(1), reference.detach().softmax(1)
    return (ref * F[row](pi / ref)).sum(1)


@each_row
def test_pointwise_values_sum_to_the_divergence(row: Row) -> None:
    logits, reference = random(7, 5, seed=1), random(7, 5, seed=2)
    close(row.pointwise(logits.log_softmax(1), reference.log_softmax(1)).sum(1), definition(row, logits, reference))
    same = logits.log_softmax(1)
    close(row.pointwise(same, same).sum(1), torch.zeros(7).double())


@each_row
def test_the_slope_is_the_derivative_of_f_up_to_its_value_at_one(row: Row) -> None:
    u = random(200, seed=3).exp().requires_grad_()
    (slope,) = torch.autograd.grad(F[row](u).sum(), u)
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (at_one,) = torch.autograd.grad(F[row](one).sum(), one)
    normalized = isinstance(row, ReverseKL | ForwardKL) and row.normalized
    close(row.slope(u.detach().log()), slope - (0.0 if normalized else at_one))
    log_q = u.detach().log().requires_grad_()
    (tilt,) = torch.autograd.grad(row.pointwise(log_q, torch.zeros_like(log_q)).sum(), log_q)
    close(tilt, u.detach() * row.slope(u.detach().log()))


@pytest.mark.parametrize("row", [row for row in F if not isinstance(row, K2 | K3)], ids=repr)
def test_the_reported_value_of_a_sampled_token_averages_to_the_divergence(row: Row) -> None:
    logits, reference = random(1, 6, seed=4), random(1, 6, seed=5)
    log_pi, log_ref = logits.log_softmax(1)[0], reference.log_softmax(1)[0]
    close((log_pi.exp() * row.sampled(log_pi - log_ref)).sum(), definition(row, logits, reference)[0])


@each_row
@pytest.mark.parametrize("steps", [1, 2])
def test_sampled_and_full_rows_have_the_gradient_of_the_local_divergence(row: Row, steps: int) -> None:
    # y ~ pi: sum over states of their probability, held fixed, times the divergence of the next token.
    logits, reference = parameters(3, steps, seed=6), parameters(3, steps, seed=7)
    first = logits.detach().softmax(1)[0]
    states = torch.cat([torch.ones(1).double(), first]) if steps == 2 else torch.ones(1).double()
    wanted = gradient((states * definition(row, logits, reference)).sum(), logits)

    tensors = responses(logits, steps, ref_logps=reference)
    tensors |= {"rewards": torch.zeros(3**steps), "group": torch.zeros(3**steps, dtype=torch.int64)}
    prefix = torch.cartesian_prod(torch.arange(3), torch.arange(3))[:, 0] if steps == 2 else torch.zeros(3).long()
    for name, source in (("logits", logits), ("ref_logits", reference.detach())):
        rows = torch.full((3**steps, 5, 3), math.nan, dtype=torch.float64)
        if steps == 2:
            rows = torch.cat(
                [rows[:, :1], source[:1].expand(9, 1, 3), rows[:, :1], source[1 + prefix][:, None], rows[:, :1]], 1
            )
        else:
            rows = torch.cat([rows[:, :2], source[:1].expand(3, 1, 3), rows[:, :2]], 1)
        tensors[name] = rows
    probability = token_logps(logits, steps).sum(1).exp()
    for loss in (Divergence(row), FullDivergence(row)):
        slope = gradient(
            expected(only(loss), {**tensors, "behavior_logps": tensors["logps"].detach()}, probability).loss, logits
        )
        close(slope, wanted)


def only(loss: Divergence | FullDivergence) -> Recipe:
    recipe = build("topr", kl_coefficient=1.0)
    return replace(recipe, terms=(replace(recipe.terms[1], loss=loss, weights=()),))


@each_row
def test_off_policy_the_weight_of_the_same_token_gives_every_row_its_gradient(row: Row) -> None:
    logits, behavior, reference = (parameters(4, 1, seed=seed) for seed in (6, 7, 8))
    tensors = responses(logits, 1, behavior_logps=behavior, ref_logps=reference) | {"rewards": torch.zeros(4)}
    recipe = only(Divergence(row))
    exact = Ratio(Truncate(0.0, math.inf), "token")
    recipe = replace(recipe, terms=(replace(recipe.terms[0], weights=(exact,)),))
    slope = gradient(expected(recipe, tensors, token_logps(behavior, 1).sum(1).exp()).loss, logits)
    close(slope, gradient(definition(row, logits, reference).sum(), logits))


def test_off_policy_the_prefix_product_gives_the_divergence_on_the_policys_own_states() -> None:
    logits, behavior, reference = (parameters(3, 2, seed=seed) for seed in (6, 7, 8))
    tensors = responses(logits, 2, behavior_logps=behavior, ref_logps=reference) | {"rewards": torch.zeros(9)}
    states = torch.cat([torch.ones(1).double(), logits.detach().softmax(1)[0]])
    for row in (K2(), K3()):
        recipe = only(Divergence(row))
        wanted = gradient((states * definition(row, logits, reference)).sum(), logits)
        for level in ("prefix", "sequence"):
            weight = Ratio(Truncate(0.0, math.inf), level)
            weighted = replace(recipe, terms=(replace(recipe.terms[0], weights=(weight,)),))
            slope = gradient(expected(weighted, tensors, token_logps(behavior, 2).sum(1).exp()).loss, logits)
            # The full product adds a ratio whose mean is 1 given the past, so that it changes nothing.
            close(slope, wanted)


@pytest.mark.parametrize("estimator", ["k2", "k3", "js", "hellinger", "tv"])
def test_with_a_tail_a_divergence_is_a_lower_bound_and_complete_for_every_symbol(estimator: str) -> None:
    logits, reference = random(1, 1, 8, seed=1), random(1, 1, 8, seed=2)
    tensors = {
        "mask": torch.ones(1, 1).bool(),
        "logps": torch.zeros(1, 1).double(),
        "behavior_logps": torch.zeros(1, 1).double(),
        "rewards": torch.zeros(1),
        "group": torch.zeros(1).long(),
        "logits": logits,
        "ref_logits": reference,
    }
    chosen = {"kl_coefficient": 1.0, "kl_rows": "full", "kl_estimator": estimator}
    values = [
        compute(build("grpo", kl_top_k=float(k), **chosen), tensors).metrics["loss_kl"] for k in (1, 2, 4, 7, 8, 0)
    ]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-3] == pytest.approx(values[-1])  # seven of eight and the rest are all eight
    assert values[-2] == values[-1] > values[0] > 0
    # k = 1 by hand: the policy's likeliest symbol against all others together.
    q, p = logits[0, 0].softmax(0), reference[0, 0].softmax(0)
    assert int(q.argmax()) != int(p.argmax())
    pair = torch.stack([torch.stack([x[q.argmax()], 1 - x[q.argmax()]]) for x in (q, p)])
    f = next(value for row, value in F.items() if row == NAMED[estimator])
    assert values[0] == pytest.approx(float((pair[1] * f(pair[0] / pair[1])).sum()))


def test_fold_keeps_the_mass() -> None:
    logps = random(3, 6, seed=1).log_softmax(1)
    folded = fold(logps, logps.topk(2).indices)
    close(folded.exp().sum(1), torch.ones(3).double())
    close(folded[:, 2].exp(), logps.exp().sort().values[:, :4].sum(1))


def test_the_limits_of_alpha_and_tsallis() -> None:
    q, p = random(1, 5, seed=1).log_softmax(1), random(1, 5, seed=2).log_softmax(1)

    def value(row: Row) -> float:
        return float(row.pointwise(q, p).sum())

    assert value(Alpha(1e-6)) == pytest.approx(value(K2()), rel=1e-5)
    assert value(Alpha(1 - 1e-6)) == pytest.approx(value(K3()), rel=1e-5)
    assert value(Alpha(0.5)) == pytest.approx(4 * value(Hellinger()))
    assert value(Tsallis(1 + 1e-6)) == pytest.approx(value(K2()), rel=1e-5)
    assert value(Tsallis(2.0)) == pytest.approx(value(ChiSquared()))


def test_bounded_divergences_stay_in_their_range() -> None:
    q, p = torch.tensor([[0.0, -80.0]]).double(), torch.tensor([[-80.0, 0.0]]).double()
    assert float(JensenShannon().pointwise(q, p).sum()) == pytest.approx(math.log(2.0))
    assert float(Hellinger().pointwise(q, p).sum()) == pytest.approx(1.0)
    assert float(TotalVariation().pointwise(q, p).sum()) == pytest.approx(1.0)


OPTIMA = {
    ForwardKL(): lambda s: -1.0 / s,  # s = (r - lam) / beta < 0
    Hellinger(): lambda s: (1 - 2 * s).clamp(min=1e-9) ** -2,
    JensenShannon(): lambda s: (2 * s).exp() / (2 - (2 * s).exp()).clamp(min=1e-9),
    ChiSquared(): lambda s: (1 + s / 2).clamp(min=0),
}
CEILING = {ForwardKL(): -1e-6, Hellinger(): 0.5 - 1e-6, JensenShannon(): math.log(2) / 2 - 1e-6, ChiSquared(): 1e6}


@pytest.mark.parametrize("row", list(OPTIMA), ids=repr)
def test_the_closed_form_optimum_of_reward_minus_divergence_is_stationary(row: Row) -> None:
    # pi = ref u(s), s = (r - lam) / beta, lam by bisection so that pi sums to 1; there r - beta f'(u) is constant.
    reward, reference, beta = random(5, seed=1), random(5, seed=2).softmax(0), 1.5
    low, high = -50.0, 50.0
    for _ in range(200):
        lam = (low + high) / 2
        s = (reward - lam) / beta
        too_much = bool(s.max() > CEILING[row]) or float((reference * OPTIMA[row](s)).sum()) > 1
        low, high = (lam, high) if too_much else (low, lam)
    pi = reference * OPTIMA[row]((reward - high) / beta)
    assert float(pi.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(pi.min()) > 0
    level = reward - beta * row.slope((pi / reference).log())
    torch.testing.assert_close(level, level.mean().expand(5), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Alpha(1.0), "alpha.a must be in (0, 1), got 1.0; its limits are k2 (0) and k3 (1)"),
        (lambda: Tsallis(1.0), "tsallis.q must be > 0 and not 1, got 1.0; its limit at 1 is k2"),
    ],
)
def test_a_parameter_at_its_limit_is_refused(make: object, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()  # type: ignore[operator]
    assert str(error.value) == text


def test_off_policy_identities_of_the_kl() -> None:
    # Sequences of one token: E_mu[w k1] and E_mu[w k3] with w differentiable, and E_mu[sg(w) k2], are
    # grad KL(pi || ref); w k2 with a differentiable w is not.
    logits, behavior, reference = (parameters(4, 1, seed=seed) for seed in (1, 2, 3))
    log_pi, log_mu, log_ref = (x.log_softmax(1)[0] for x in (logits, behavior.detach(), reference.detach()))
    away, w = log_pi - log_ref, (log_pi - log_mu).exp()
    wanted = gradient((log_pi.exp() * away).sum(), logits)
    for loss in (w * away, w * (torch.expm1(-away) + away), w.detach() * away.square() / 2):
        close(gradient((log_mu.exp() * loss).sum(), logits), wanted)
    wrong = gradient((log_mu.exp() * w * away.square() / 2).sum(), logits)
    assert (wrong - wanted).abs().max() > 1e-2
    batch = Batch.from_tensors(
        {"mask": torch.ones(4, 1).bool(), "logps": log_pi[:, None], "ref_logps": log_ref[:, None]}, recipe="test"
    )
    loss = Divergence(K2())(batch, torch.zeros(4, 1).double(), w.detach()[:, None])
    close(gradient((log_mu.exp() * loss[:, 0]).sum(), logits), wanted)
