"""The exact solvers against recorded iterates of two games, their rates and limits, and the recipes against them."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives import build
from distrl.tabular import (
    exploitability,
    mirror_descent,
    nash_equilibrium,
    nash_md,
    nash_mirror_prox,
    proximal_point,
)
from tests.objectives.tabular import expected, gradient, random, responses

VECTORS = json.loads((Path(__file__).parent / "vectors" / "preference.json").read_text())
each_game = pytest.mark.parametrize("game", ["G1", "G2"])


def tensor(values: list[float] | list[str]) -> Tensor:
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


def load(game: str) -> tuple[Tensor, Tensor, float, float, Tensor]:
    """Preference, reference, beta, eta and the equilibrium."""
    record = VECTORS[game]
    matrix = torch.tensor(record["P"], dtype=torch.float64)
    return matrix, tensor(record["ref"]), record["beta"], record["eta"], tensor(record["pi_star"])


def kl(best: Tensor, policies: Tensor) -> list[float]:
    return [float((best * (best.log() - policy.log())).sum()) for policy in policies]


def even_game(n: int, seed: int) -> tuple[Tensor, Tensor]:
    upper = random(n, n, seed=seed).triu(1)
    return (upper - upper.T).sigmoid(), (0.3 * random(n, seed=seed + 1)).softmax(0)


def frequencies(preference: Tensor, best: Tensor, beta: float) -> Tensor:
    """w of each pair of eigenvalues +-iw of (P - 1/2)(diag p* - p* p*^T) / beta, without the trivial null vector
    of adding a constant to log p."""
    system = (preference - 0.5) @ (best.diag() - torch.outer(best, best)) / beta
    values = torch.linalg.eigvals(system)
    order = values.abs().argsort()
    return values[order][1:].imag.abs()


@each_game
def test_mirror_prox_reproduces_the_recorded_divergences(game: str) -> None:
    matrix, reference, beta, eta, best = load(game)
    policies = nash_mirror_prox(matrix, reference, beta, eta, 60)
    assert kl(best, policies) == pytest.approx(VECTORS[game]["nash_mp_kl"], abs=1e-9)
    torch.testing.assert_close(policies[:6], torch.tensor(VECTORS[game]["nash_mp_pi"]).double(), rtol=0, atol=1e-6)
    for policy, wanted in zip(policies, VECTORS[game]["nash_mp_pi"], strict=False):
        assert policy.tolist() == pytest.approx(wanted, abs=1e-9)


@each_game
def test_the_recorded_exploitability_and_span_follow(game: str) -> None:
    matrix, reference, beta, eta, best = load(game)
    policies = nash_mirror_prox(matrix, reference, beta, eta, 60)
    exploit = [exploitability(policy, matrix, reference, beta) for policy in policies[:21]]
    assert exploit == pytest.approx(VECTORS[game]["expl"], abs=1e-9)
    away = policies.log() - best.log()
    assert (away.amax(1) - away.amin(1)).tolist() == pytest.approx(VECTORS[game]["span"], abs=1e-9)


@each_game
def test_mirror_descent_and_nash_md_reproduce_the_recorded_divergences(game: str) -> None:
    matrix, reference, beta, eta, best = load(game)
    assert eta / (1 + eta) == pytest.approx(VECTORS[game]["omd_alpha"])
    assert eta / (1 + eta) / beta == pytest.approx(VECTORS[game]["nash_md_eta"])
    assert kl(best, mirror_descent(matrix, reference, beta, eta, 60)) == pytest.approx(
        VECTORS[game]["omd_kl"], abs=1e-9
    )
    assert kl(best, nash_md(matrix, reference, beta, eta, 60)) == pytest.approx(VECTORS[game]["nash_md_kl"], abs=1e-9)


@each_game
def test_the_equilibrium_answers_itself(game: str) -> None:
    matrix, reference, beta, _, best = load(game)
    answer = (reference.log() + matrix @ best / beta).softmax(0)
    torch.testing.assert_close(answer, best, rtol=0, atol=1e-12)
    torch.testing.assert_close(nash_equilibrium(matrix, reference, beta), best, rtol=0, atol=1e-12)
    assert exploitability(best, matrix, reference, beta) == pytest.approx(0.0, abs=1e-12)


@each_game
def test_every_iteration_of_mirror_prox_contracts_by_the_proved_factor(game: str) -> None:
    matrix, reference, beta, eta, best = load(game)
    divergences = kl(best, nash_mirror_prox(matrix, reference, beta, eta, 30))
    worst = max(later / earlier for earlier, later in itertools.pairwise(divergences))
    assert worst == pytest.approx({"G1": 0.62953, "G2": 0.70782}[game], abs=1e-5)
    assert worst < 1 / (1 + 2 * beta)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_the_factor_holds_in_random_games(beta: float) -> None:
    for seed in range(5):
        matrix, reference = even_game(8, 10 * seed)
        best = nash_equilibrium(matrix, reference, beta)
        divergences = kl(best, nash_mirror_prox(matrix, reference, beta, 2 * beta, 12))
        for earlier, later in itertools.pairwise(divergences):
            assert later <= earlier / (1 + 2 * beta) + 1e-14


@pytest.mark.parametrize(("game", "wanted"), [("G1", 0.6139735), ("G2", 0.6321991)], ids=["G1", "G2"])
def test_the_asymptotic_ratio_is_the_largest_over_all_eigenvalues(game: str, wanted: float) -> None:
    matrix, reference, beta, eta, best = load(game)
    a = eta / (1 + eta)
    w = frequencies(matrix, best, beta)
    assert float(w.max()) == pytest.approx({"G1": 1.8134905850, "G2": 5.7012335584}[game], abs=1e-8)
    modes = (1 - a - a**2 * w**2) ** 2 + (a * w * (1 - a)) ** 2
    assert float(modes.max()) == pytest.approx(wanted, abs=1e-6)
    divergences = kl(best, nash_mirror_prox(matrix, reference, beta, eta, 40))
    assert divergences[40] / divergences[39] == pytest.approx(wanted, abs=1e-5)


def test_an_even_game_has_a_mode_that_does_not_turn_and_is_the_slowest() -> None:
    # n - 1 is odd, so one w is 0: (1 - a)^2 = 1 / (1 + eta)^2, which the largest w would hide.
    matrix, reference = even_game(4, 4)
    beta, eta = 0.1, 0.2
    best, a = nash_equilibrium(matrix, reference, beta), eta / (1 + eta)
    w = frequencies(matrix, best, beta)
    modes = (1 - a - a**2 * w**2) ** 2 + (a * w * (1 - a)) ** 2
    assert float(w.min()) == pytest.approx(0.0, abs=1e-8)
    assert float(modes.max()) == pytest.approx(1 / (1 + eta) ** 2, abs=1e-9)
    divergences = kl(best, nash_mirror_prox(matrix, reference, beta, eta, 55))
    assert divergences[55] / divergences[54] == pytest.approx(1 / (1 + eta) ** 2, abs=1e-3)
    assert float(modes[w.argmax()]) < 0.99 / (1 + eta) ** 2


def test_self_play_without_the_second_half_step_does_not_converge_on_g2() -> None:
    matrix, reference, beta, eta, best = load("G2")
    policies = mirror_descent(matrix, reference, beta, eta, 2000)
    assert kl(best, policies[[200, 2000]]) == pytest.approx([0.3355, 0.3357], abs=1e-4)
    assert kl(best, nash_mirror_prox(matrix, reference, beta, eta, 50)[-1:])[0] < 1e-10
    # |1 - a + i a w|^2 with the largest w is the growth rate; below a = 2 / (1 + w^2) it converges.
    w = float(frequencies(matrix, best, beta).max())
    assert (1 - 1 / 11) ** 2 + (w / 11) ** 2 == pytest.approx(1.0951, abs=1e-4)
    assert 2 / (1 + w**2) == pytest.approx(0.059694, abs=1e-6)
    assert kl(best, mirror_descent(matrix, reference, beta, 0.02 / 0.98, 100)[-1:])[0] == pytest.approx(
        0.0144, abs=1e-4
    )


def test_nash_md_at_a_constant_step_ends_in_the_equilibrium_of_another_temperature() -> None:
    matrix, reference, beta, _, best = load("G1")
    a = 0.5 * beta  # its own step 0.5
    last = nash_md(matrix, reference, beta, a / (1 - a), 4000)[-1]
    assert last.tolist() == pytest.approx([0.400012947, 0.2045631876, 0.3954238653], abs=1e-9)
    assert kl(best, last[None])[0] == pytest.approx(2.1252e-4, abs=1e-8)
    mix = ((1 - a) * last.log() + a * reference.log()).softmax(0)
    torch.testing.assert_close(mix, nash_equilibrium(matrix, reference, beta / (1 - a)), rtol=0, atol=1e-12)


def test_the_exact_proximal_point_contracts_for_any_step() -> None:
    matrix, reference, beta, _, best = load("G1")
    policies = proximal_point(matrix, reference, beta, 1.0, 4)
    assert kl(best, policies) == pytest.approx([0.0936538, 0.0136419, 0.00190652, 0.000263645, 3.64565e-5], rel=1e-5)
    assert policies[1].tolist() == pytest.approx([0.480727412, 0.1962696486, 0.3230029394], abs=1e-9)
    matrix, reference, beta, _, best = load("G2")
    g2 = kl(best, proximal_point(matrix, reference, beta, 1.0, 3))
    assert g2 == pytest.approx([0.232118, 0.0080606, 2.21605e-4, 6.07422e-6], rel=1e-5)
    for eta in (0.1, 10.0):
        divergences = kl(best, proximal_point(matrix, reference, beta, eta, 3))
        for earlier, later in itertools.pairwise(divergences):
            assert later <= earlier / (1 + eta) + 1e-14


def recipe_gradient(policy: Tensor, opponent: Tensor, anchor: Tensor, game: str, prox: float) -> Tensor:
    """Expected gradient of the nash_mp loss at a policy in the game, every response drawn from the policy."""
    matrix, reference, beta, _, _ = load(game)
    logits = policy.log()[None].clone().requires_grad_()
    tensors = responses(logits, 1, ref_logps=reference.log()[None], anchor_logps=anchor.log()[None])
    tensors |= {"behavior_logps": tensors["logps"].detach(), "preference": matrix @ opponent}
    recipe = build("nash_mp", beta=beta, prox=prox, baseline="half")
    return gradient(expected(recipe, tensors, policy).loss, logits)


@each_game
def test_the_loss_of_nash_mp_is_stationary_at_each_half_step(game: str) -> None:
    # prox = beta / eta; both halves are anchored at p_k, the second one meets the first half step.
    matrix, reference, beta, eta, _ = load(game)
    a = eta / (1 + eta)
    start = nash_mirror_prox(matrix, reference, beta, eta, 3)
    for policy, after in itertools.pairwise(start):
        half = (a * (reference.log() + matrix @ policy / beta) + (1 - a) * policy.log()).softmax(0)
        assert recipe_gradient(half, policy, policy, game, beta / eta).abs().max() < 1e-12
        assert recipe_gradient(after, half, policy, game, beta / eta).abs().max() < 1e-12
        assert recipe_gradient(policy, policy, policy, game, beta / eta).abs().max() > 1e-3


@each_game
def test_a_target_that_follows_rests_at_the_equilibrium_and_a_frozen_one_elsewhere(game: str) -> None:
    matrix, reference, beta, eta, best = load(game)
    assert recipe_gradient(best, best, best, game, 0.5).abs().max() < 1e-12
    # Opponent and anchor frozen at the reference: reference exp(P reference / (beta (1 + 1 / eta))).
    frozen = (reference.log() + matrix @ reference / (beta * (1 + 1 / eta))).softmax(0)
    if game == "G1":
        assert frozen.tolist() == pytest.approx([0.5464723394, 0.2349387249, 0.2185889357], abs=1e-9)
    assert recipe_gradient(frozen, reference, reference, game, beta / eta).abs().max() < 1e-12


@each_game
@pytest.mark.parametrize("share", [0.125, 0.5])
def test_the_loss_of_nash_md_rests_where_its_mixture_is_the_equilibrium_of_a_higher_temperature(
    game: str, share: float
) -> None:
    matrix, reference, beta, _, best = load(game)

    def mixed(policy: Tensor) -> Tensor:
        return ((1 - share) * policy.log() + share * reference.log()).softmax(0)

    def loss_gradient(policy: Tensor) -> Tensor:
        logits = policy.log()[None].clone().requires_grad_()
        tensors = responses(logits, 1, ref_logps=reference.log()[None])
        tensors |= {"behavior_logps": tensors["logps"].detach(), "preference": matrix @ mixed(policy)}
        recipe = build("nash_md", tau=beta, mixture=share, baseline="half")
        return gradient(expected(recipe, tensors, policy).loss, logits)

    # Stationary: policy = reference exp(P mixture / beta) / Z. Mixed with the reference that is the mixture again, so
    # mixture = reference exp((1 - share) P mixture / beta) / Z: the equilibrium at beta / (1 - share).
    wanted = nash_equilibrium(matrix, reference, beta / (1 - share))
    rest = (reference.log() + matrix @ wanted / beta).softmax(0)
    torch.testing.assert_close(mixed(rest), wanted, rtol=0, atol=1e-12)
    assert loss_gradient(rest).abs().max() < 1e-12
    # Which is not the equilibrium of the game itself.
    assert loss_gradient(best).abs().max() > 1e-4


def test_between_two_responses_every_opponent_is_the_same() -> None:
    # P(1 beats q) - P(2 beats q) does not depend on q, so that offline and online learning agree.
    matrix = torch.tensor([[0.5, 0.8], [0.2, 0.5]], dtype=torch.float64)
    gaps = [float((matrix[0] - matrix[1]) @ torch.tensor([q, 1 - q], dtype=torch.float64)) for q in (0.1, 0.5, 0.9)]
    assert gaps == pytest.approx([0.3, 0.3, 0.3])
    reference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    wanted = (reference.log() + torch.tensor([0.3, 0.0], dtype=torch.float64) / 0.2).softmax(0)
    torch.testing.assert_close(nash_equilibrium(matrix, reference, 0.2), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"preference": torch.ones(3, 3)},
            "preference must be [3, 3] like the reference, with P + P^T = 1, got [3, 3]; "
            "a response beats another one as often as that one loses",
        ),
        (
            {"reference": torch.tensor([0.5, 0.5, 0.5])},
            "reference must be probabilities > 0 that sum to 1, got the sum 1.5; use softmax",
        ),
        (
            {"eta": 0.0},
            "beta and eta must be > 0 and iterations >= 0, got 0.1, 0.0 and 1; eta = 2 beta is usual",
        ),
    ],
)
def test_what_is_no_game_is_refused(change: dict[str, Tensor | float], text: str) -> None:
    matrix, reference, beta, eta, _ = load("G1")
    arguments = {"preference": matrix, "reference": reference, "beta": beta, "eta": eta, "iterations": 1, **change}
    with pytest.raises(ConfigError) as error:
        nash_mirror_prox(**arguments)
    assert str(error.value) == text


def test_the_solvers_do_not_depend_on_how_probabilities_are_stored() -> None:
    matrix, reference, beta, eta, _ = load("G1")
    single = nash_mirror_prox(matrix.float(), reference.float(), beta, eta, 5)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, nash_mirror_prox(matrix, reference, beta, eta, 5), rtol=0, atol=1e-6)
    assert math.isclose(float(single[-1].sum()), 1.0)
