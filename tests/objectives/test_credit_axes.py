"""Returns, baselines and scales by their identities; value heads against loops."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError
from distrl.objectives import Batch, build, compute, evaluate, prepare
from distrl.objectives.baselines import BatchStd, EffectivePositives, GroupMean, LeaveOneOut, Then
from distrl.objectives.returns import GAE, Now, ToGo, VTrace, Whole
from distrl.objectives.schedules import Adaptive, Cosine, Linear
from tests.objectives.tabular import close, random

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]]).bool()
STEPS = [[0, 1, 2, 3], [1, 3], [0, 2]]


def batch(**tensors: Tensor) -> Batch:
    return Batch.from_tensors({"mask": MASK, **tensors}, recipe="test")


def rewards() -> Tensor:
    return torch.where(MASK, random(3, 4, seed=1), 0.0)


def values() -> Tensor:
    return torch.where(MASK, random(3, 4, seed=2), math.nan)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.9, 0.0), (0.5, 1.0)])
def test_gae_is_the_sum_of_discounted_temporal_differences_over_learnable_tokens(gamma: float, lam: float) -> None:
    r, v = rewards(), values()
    credited = GAE(gamma, lam)(r, batch(values=v)) - torch.where(MASK, v, 0.0)
    for i, steps in enumerate(STEPS):
        deltas = [
            float(r[i, t] + gamma * (v[i, steps[k + 1]] if k + 1 < len(steps) else 0.0) - v[i, t])
            for k, t in enumerate(steps)
        ]
        for k, t in enumerate(steps):
            wanted = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[k:]))
            assert float(credited[i, t]) == pytest.approx(wanted, abs=1e-12)


def test_gae_without_discount_is_the_return_to_go() -> None:
    r = rewards()
    close(torch.where(MASK, GAE()(r, batch(values=values())), 0.0), torch.where(MASK, ToGo()(r, batch()), 0.0))


def test_discounting_counts_learnable_tokens_only() -> None:
    r = torch.zeros(3, 4).double()
    r[:, 3] = 1.0
    r[2] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    discounted = ToGo(0.5)(r, batch())
    assert discounted[0].tolist() == [0.125, 0.25, 0.5, 1.0]
    assert discounted[1, [1, 3]].tolist() == [0.5, 1.0]
    assert discounted[2, [0, 2]].tolist() == [0.5, 1.0]
    close(ToGo(1.0 - 1e-15)(rewards(), batch()), ToGo(1.0)(rewards(), batch()))


def test_whole_to_go_and_now_agree_where_only_one_token_is_left() -> None:
    r = rewards()
    close(Whole()(r, batch())[:, 0], ToGo()(r, batch())[:, 0])
    for i, steps in enumerate(STEPS):
        assert Now()(r, batch())[i, steps[-1]] == ToGo()(r, batch())[i, steps[-1]]


def vtrace(trace: VTrace, log_ratio: Tensor, r: Tensor, v: Tensor) -> Tensor:
    behavior = random(3, 4, seed=5)
    return trace.targets(r, batch(values=v, behavior_logps=behavior, logps=behavior + log_ratio))


def test_vtrace_on_policy_is_the_return_to_go() -> None:
    r = rewards()
    close(vtrace(VTrace(), torch.zeros(3, 4).double(), r, values())[MASK], ToGo()(r, batch())[MASK])


@pytest.mark.parametrize(("rho_bar", "c_bar", "lam"), [(1.0, 1.0, 1.0), (2.0, 1.0, 0.9), (math.inf, 1.5, 1.0)])
def test_vtrace_is_its_sum_over_later_tokens(rho_bar: float, c_bar: float, lam: float) -> None:
    r, v, log_ratio, gamma = rewards(), values(), 0.5 * random(3, 4, seed=3), 0.9
    actual = vtrace(VTrace(gamma, lam, rho_bar, c_bar), log_ratio, r, v)
    ratio = log_ratio.exp()
    for i, steps in enumerate(STEPS):
        for k, t in enumerate(steps):
            total, trace = float(v[i, t]), 1.0
            for n, s in enumerate(steps[k:]):
                after = float(v[i, steps[k + n + 1]]) if k + n + 1 < len(steps) else 0.0
                delta = min(rho_bar, float(ratio[i, s])) * (float(r[i, s]) + gamma * after - float(v[i, s]))
                total += gamma**n * trace * delta
                trace *= lam * min(c_bar, float(ratio[i, s]))
            assert float(actual[i, t]) == pytest.approx(total, abs=1e-12)


def test_the_return_of_vtrace_is_the_reward_and_the_next_target() -> None:
    r, v, log_ratio, behavior = rewards(), values(), 0.5 * random(3, 4, seed=3), random(3, 4, seed=5)
    rows = batch(values=v, behavior_logps=behavior, logps=behavior + log_ratio)
    trace = VTrace(gamma=0.9)
    returns, targets = trace(r, rows), trace.targets(r, rows)
    for i, steps in enumerate(STEPS):
        for t, after in itertools.pairwise([*steps, None]):
            assert t is not None
            following = 0.0 if after is None else float(targets[i, after])
            assert float(returns[i, t]) == pytest.approx(float(r[i, t]) + 0.9 * following, abs=1e-12)


@pytest.mark.parametrize("rho_bar", [1e-9, 0.8, 1.0, 1e9])
def test_the_fixed_point_of_vtrace_is_the_value_of_the_truncated_policy(rho_bar: float) -> None:
    # pi_rhobar = min(rho_bar mu, pi) / Z: pi for rho_bar to infinity, mu for rho_bar to 0. Responses of one token.
    pi, mu, reward = random(4, seed=1).softmax(0), random(4, seed=2).softmax(0), random(4, seed=3)
    truncated = torch.minimum(rho_bar * mu, pi)
    value = (truncated * reward).sum() / truncated.sum()
    one = Batch.from_tensors(
        {
            "mask": torch.ones(4, 1).bool(),
            "values": value.expand(4, 1),
            "logps": pi.log()[:, None],
            "behavior_logps": mu.log()[:, None],
        },
        recipe="test",
    )
    moved = (mu * VTrace(rho_bar=rho_bar).targets(reward[:, None], one)[:, 0]).sum()
    assert float(moved - value) / min(rho_bar, 1.0) == pytest.approx(0.0, abs=1e-10)


def ppo_tensors() -> dict[str, Tensor]:
    behavior = random(3, 4, seed=5)
    return {
        "mask": MASK,
        "logps": behavior + 0.3 * random(3, 4, seed=6),
        "behavior_logps": behavior,
        "values": values(),
        "rewards": torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
    }


def test_ppo_credit_without_discount_is_reward_minus_value() -> None:
    tensors = ppo_tensors()
    credit = prepare(build("ppo", normalize="none"), Batch.from_tensors(tensors, recipe="ppo")).credit
    close(credit[MASK], (tensors["rewards"][:, None] - tensors["values"])[MASK])
    zero = {**tensors, "values": torch.zeros(3, 4)}
    credit = prepare(build("ppo", normalize="none"), Batch.from_tensors(zero, recipe="ppo")).credit
    close(credit[MASK], tensors["rewards"][:, None].expand(3, 4)[MASK])


def test_normalized_advantages_have_mean_0_and_variance_1() -> None:
    credit = prepare(build("ppo", epsilon=0.0), Batch.from_tensors(ppo_tensors(), recipe="ppo")).credit[MASK]
    close(torch.stack([credit.mean(), credit.square().mean()]), torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_the_value_loss_is_the_larger_of_the_clipped_and_the_plain_square(clip: float) -> None:
    tensors = ppo_tensors()
    recipe = build("ppo", value_clip=clip, value_coefficient=0.7)
    whole = Batch.from_tensors(tensors, recipe="ppo")
    plan = prepare(recipe, whole)
    moved = (torch.nan_to_num(tensors["values"]) + 0.5 * random(3, 4, seed=8)).requires_grad_()
    index = torch.arange(3)
    output = evaluate(recipe, whole.rows(index, tensors["logps"], {"values": moved}), plan.rows(index))
    total = torch.zeros((), dtype=torch.float64)
    for i, steps in enumerate(STEPS):
        for t in steps:
            target, old = tensors["rewards"][i], tensors["values"][i, t]
            near = old + (moved[i, t] - old).clamp(-clip, clip)
            total = total + torch.maximum((moved[i, t] - target) ** 2, (near - target) ** 2) / 2 / 8
    assert output.metrics["loss_value"] == pytest.approx(0.7 * float(total.detach()), abs=1e-10)
    close(torch.autograd.grad(output.loss, moved)[0], torch.autograd.grad(0.7 * total, moved)[0])


def test_equal_returns_have_a_credit_of_exactly_zero_under_every_group_baseline() -> None:
    group = torch.tensor([7, 7, 7])
    for value in (0.0, 0.1, 1.0 / 3.0, 1e9):
        returns = torch.full((3, 4), value, dtype=torch.float64)
        for baseline in (GroupMean(), LeaveOneOut(), Then(GroupMean(), GroupMean()), EffectivePositives(0.15)):
            assert not (returns - baseline(returns, batch(group=group))).any()
        assert not ((returns - returns.mean()) / BatchStd(0.0)(returns, batch())).round(decimals=6).any()


def test_a_response_alone_in_its_group_has_no_leave_one_out_credit() -> None:
    returns = torch.tensor([[1.0], [3.0], [4.0]], dtype=torch.float64).expand(3, 4)
    left_out = LeaveOneOut()(returns, batch(group=torch.tensor([0, 1, 1])))
    assert left_out[:, 0].tolist() == [1.0, 4.0, 3.0]


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.8])
def test_a_chosen_share_of_positives_is_reached_by_the_closed_form_for_signs(share: float, fraction: float) -> None:
    # c = (p - p~) / (p + p~ - 2 p p~) for rewards in {-1, 1}, and any rewards have the chosen share.
    signs = torch.where(torch.arange(20) < round(20 * fraction), 1.0, -1.0).double()
    c = (fraction - share) / (fraction + share - 2 * fraction * share)
    recipe = build("topr", baseline_kind="positives", positives=share)
    for reward in (signs, random(20, seed=3)):
        tensors = {"mask": torch.ones(20, 2).bool(), "rewards": reward}
        plan = prepare(recipe, Batch.from_tensors(tensors, recipe="topr"))
        assert plan.metrics["effective_positives"] == pytest.approx(share, abs=1e-10)
        if reward is signs:
            close(plan.credit[:, 0], signs - c)


def test_a_group_baseline_without_groups_names_the_tensor() -> None:
    with pytest.raises(SchemaError) as error:
        GroupMean()(rewards(), batch())
    assert str(error.value) == (
        "the batch has no tensor group ([B] int), which a group mean reads; pass ticket numbers"
    )


def test_schedules() -> None:
    assert [Linear(1.0, 0.0, 4)(step, {}) for step in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    assert [Cosine(1.0, 0.0, 4)(step, {}) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    adaptive = Adaptive(0.1, target=0.02, horizon=10.0)
    assert adaptive(0, {}) == 0.1
    # Three times the target is an error of 2, clipped to .2: c (1 + .2 / 10); a tenth above it counts as it is.
    assert adaptive(1, {"kl_reference": 0.06, "coefficient_kl": 0.5}) == pytest.approx(0.5 * 1.02)
    assert adaptive(1, {"kl_reference": 0.022, "coefficient_kl": 0.5}) == pytest.approx(0.5 * 1.01)
    assert adaptive(1, {"kl_reference": 0.0, "coefficient_kl": 0.5}) == pytest.approx(0.5 * 0.98)


def test_an_adaptive_coefficient_reports_itself_and_goes_on_from_there() -> None:
    recipe = build(
        "ppo", normalize="none", kl_coefficient=0.1, kl_controller="adaptive", kl_target=0.02, kl_horizon=10.0
    )
    tensors = ppo_tensors() | {"ref_logps": random(3, 4, seed=9)}
    rows = Batch.from_tensors(tensors, recipe="ppo")
    first = prepare(recipe, rows)
    assert first.metrics["coefficient_kl"] == 0.1
    second = prepare(recipe, rows, {**first.metrics, "kl_reference": 1.0})
    assert second.metrics["coefficient_kl"] == pytest.approx(0.102)
    plain = build("ppo", normalize="none", kl_coefficient=0.102)
    close(second.credit, prepare(plain, rows).credit)
    assert "coefficient_kl" not in compute(plain, tensors).metrics


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GAE(gamma=1.5), "gae.gamma must be in [0, 1], got 1.5; 1 does not discount"),
        (lambda: ToGo(-0.1), "to_go.gamma must be in [0, 1], got -0.1; 1 does not discount"),
        (lambda: VTrace(rho_bar=0.0), "vtrace.rho_bar must be > 0, got 0.0; the paper has 1"),
        (lambda: Cosine(1.0, 0.0, 0), "cosine.steps must be >= 1, got 0; use fixed for a constant coefficient"),
        (
            lambda: Adaptive(0.1, 0.0, 1.0),
            "adaptive.target and adaptive.horizon must be > 0, got 0.0 and 1.0; "
            "use fixed for a coefficient that does not move",
        ),
        (lambda: EffectivePositives(1.0), "positives.share must be in (0, 1), got 1.0; the paper has 0.1 to 0.2"),
    ],
)
def test_a_constant_out_of_range_is_refused(make: object, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()  # type: ignore[operator]
    assert str(error.value) == text
