"""Quantiles of importance ratios from additive counts, against those of the ratios themselves."""

import pytest
import torch

from distrl.objectives.quantiles import EDGES, QUANTILES, bin_counts, ratio_quantiles


def counts(log_ratio: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    return {name: float(count) for name, count in bin_counts(log_ratio, mask).items()}


@pytest.mark.parametrize("spread", [0.01, 0.2, 1.5])
def test_a_quantile_lies_in_the_bin_of_the_exact_one(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = spread * torch.randn(50, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(50, 40, generator=generator) < 0.8
    found = ratio_quantiles(counts(log_ratio, mask))
    for name, share in QUANTILES.items():
        exact = torch.quantile(log_ratio[mask], share).item()
        # Bins are a third wide of what they are from 0, at least 0.002 nats; the two may lie in neighbors.
        assert torch.tensor(found[name]).log().item() == pytest.approx(exact, rel=0.34, abs=0.002)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    log_ratio = torch.linspace(-9, 9, 120, dtype=torch.float64).reshape(12, 10)
    mask = torch.ones(12, 10, dtype=torch.bool)
    parts = [counts(log_ratio[rows], mask[rows]) for rows in (slice(0, 5), slice(5, 12))]
    assert {name: sum(p[name] for p in parts) for name in parts[0]} == counts(log_ratio, mask)
    assert sum(parts[0].values()) == 50


def test_ratios_of_one_have_the_median_one_and_what_is_beyond_the_bins_is_at_their_edge() -> None:
    mask = torch.ones(1, 100, dtype=torch.bool)
    on_policy = ratio_quantiles(counts(torch.zeros(1, 100, dtype=torch.float64), mask))
    assert on_policy == pytest.approx(dict.fromkeys(QUANTILES, 1.0), abs=1.1e-3)
    far = ratio_quantiles(counts(torch.full((1, 100), 30.0, dtype=torch.float64), mask))
    assert far["ratio_p50"] == pytest.approx(torch.tensor(EDGES[-1]).exp().item())


def test_without_ratios_there_are_no_quantiles() -> None:
    assert ratio_quantiles({"loss": 1.0}) == {}
