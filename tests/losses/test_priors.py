"""Attention priors: shapes, sums, seeds, how many bumps, and the shape of one bump."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spdfq.losses import GaussianMixturePrior, LaplacePrior

PRIORS = [GaussianMixturePrior, LaplacePrior]
every_prior = pytest.mark.parametrize("prior", PRIORS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(
    prior=st.sampled_from(PRIORS),
    components=st.integers(1, 6),
    low=st.floats(1e-3, 0.5),
    spread=st.floats(1.0, 10.0),
    correlation=st.floats(0.0, 1.0, exclude_max=True),
    combine=st.sampled_from(["sum", "max"]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32),
)
def test_maps_are_non_negative_and_sum_to_one(prior, components, low, spread, correlation, combine, grid, seed):
    made = prior(components, sigma=(low, low * spread), correlation=correlation, combine=combine)
    maps = made.sample(7, grid, seeded(seed))
    assert maps.shape == (7, grid[0] * grid[1])
    assert maps.dtype == torch.float32
    assert (maps >= 0).all()
    assert torch.allclose(maps.sum(-1), torch.ones(7), atol=1e-5)


@every_prior
def test_the_generator_alone_decides(prior):
    torch.manual_seed(1)
    first = prior().sample(5, (6, 4), seeded(3))
    torch.manual_seed(2)
    assert torch.equal(first, prior().sample(5, (6, 4), seeded(3)))
    assert not torch.equal(first, prior().sample(5, (6, 4), seeded(4)))


@every_prior
def test_a_map_has_one_to_max_components_bumps_all_equally_often(prior):
    maps = prior(5, sigma=(0.004, 0.004), correlation=0.0, combine="max").sample(400, (64, 64), seeded())
    pictures = maps.view(400, 1, 64, 64)
    highest = F.max_pool2d(pictures, 5, 1, 2)
    peaks = ((pictures == highest) & (pictures > 1e-3 * pictures.amax((2, 3), keepdim=True))).sum((1, 2, 3))
    shares = torch.bincount(peaks, minlength=6) / 400
    assert shares[0] == 0
    assert len(shares) == 6  # never more than 5
    assert ((shares[1:] > 0.14) & (shares[1:] < 0.26)).all()


def test_one_component_is_a_correlated_gaussian():
    height, width, sigma = 8, 10, 0.3
    maps = GaussianMixturePrior(1, sigma=(sigma, sigma), correlation=0.5).sample(50, (height, width), seeded())
    log = maps.double().log().view(50, height, width)
    # log density = c - (y² + x² - 2 rho y x) / (2 sigma² (1 - rho²)), y and x in sides of the grid
    down = (log[:, 2:] - 2 * log[:, 1:-1] + log[:, :-2]).mean((1, 2)) * height**2
    across = (log[:, :, 2:] - 2 * log[:, :, 1:-1] + log[:, :, :-2]).mean((1, 2)) * width**2
    mixed = (log[:, 1:, 1:] - log[:, 1:, :-1] - log[:, :-1, 1:] + log[:, :-1, :-1]).mean((1, 2)) * height * width
    rho = mixed / -down
    expected = -1 / (sigma**2 * (1 - rho**2))
    assert torch.allclose(down, expected, rtol=1e-3)
    assert torch.allclose(across, expected, rtol=1e-3)
    assert rho.abs().max() <= 0.5
    assert rho.min() < -0.4
    assert rho.max() > 0.4


def test_centres_are_uniform_over_a_grid_that_is_not_square():
    maps = GaussianMixturePrior(1, sigma=(0.01, 0.01)).sample(2000, (2, 5), seeded())
    shares = torch.bincount(maps.argmax(-1), minlength=10) / 2000
    assert ((shares > 0.08) & (shares < 0.12)).all()


def test_standard_deviations_are_uniform_over_their_range():
    maps = GaussianMixturePrior(1, sigma=(0.1, 0.5), correlation=0.0).sample(1000, (9, 9), seeded())
    log = maps.double().log().view(1000, 9, 9)
    curvature = (log[:, 2:, 4] - 2 * log[:, 1:-1, 4] + log[:, :-2, 4])[:, 3] * 81
    sigma = (-1 / curvature).sqrt()
    assert sigma.min() == pytest.approx(0.1, abs=0.005)
    assert sigma.max() == pytest.approx(0.5, abs=0.005)
    assert sigma.mean() == pytest.approx(0.3, abs=0.01)


def test_a_gaussian_falls_with_the_squared_distance_and_a_laplace_bump_with_the_distance():
    squared = torch.tensor([0.0, 1.0, 4.0])
    assert GaussianMixturePrior().log_profile(squared).tolist() == pytest.approx([0, -0.5, -2])
    assert LaplacePrior().log_profile(squared).tolist() == pytest.approx([0, -math.sqrt(2), -2 * math.sqrt(2)])


@every_prior
def test_bumps_add_up_or_the_highest_counts(prior):
    summed, highest = (prior(4, combine=combine).sample(20, (6, 6), seeded()) for combine in ("sum", "max"))
    single_summed, single_highest = (
        prior(1, combine=combine).sample(20, (6, 6), seeded()) for combine in ("sum", "max")
    )
    assert not torch.allclose(summed, highest)
    assert torch.equal(single_summed, single_highest)


@every_prior
def test_a_bump_too_narrow_for_a_coarse_grid_falls_on_the_nearest_token(prior):
    maps = prior(1, sigma=(1e-4, 1e-4)).sample(100, (2, 2), seeded())
    assert maps.amax(-1).min() > 0.9


@every_prior
@pytest.mark.parametrize(
    "wrong",
    [
        {"max_components": 0},
        {"sigma": (0.0, 0.2)},
        {"sigma": (0.3, 0.2)},
        {"sigma": (0.1, math.inf)},
        {"sigma": (math.nan, 1.0)},
        {"correlation": 1.0},
        {"correlation": -0.1},
        {"combine": "mean"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(prior, wrong):
    with pytest.raises(ValueError, match=r"must be|expected"):
        prior(**wrong)
