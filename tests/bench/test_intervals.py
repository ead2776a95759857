"""Intervals of paired differences: their coverage on simulated data, and their limits."""

import time
from math import erf

import numpy as np
import pytest

from spdfq.bench.intervals import Difference, difference_over_seeds, paired_difference

POPULATION = 4_000  # images from which the test images are drawn


def population(spread_of_seeds, spread_of_cells):
    """A function that draws the results of two models on new seeds and new images, and the true difference."""
    rng = np.random.default_rng(5)
    easy, own = rng.normal(1.2, 1, POPULATION), rng.normal(0.1, 0.3, POPULATION)

    def probability(shift):
        """Probability of being right, over seeds and cells, for each image."""
        scale = np.hypot(spread_of_seeds, spread_of_cells) * np.sqrt(2)
        return np.array([(1 + erf(value / scale)) / 2 for value in easy + shift])

    truth = 100 * float((probability(own) - probability(0)).mean())

    def draw(seeds, images):
        chosen = rng.integers(0, POPULATION, images)

        def model(shift):
            moved = rng.normal(0, spread_of_seeds, (seeds, 1)) + rng.normal(0, spread_of_cells, (seeds, images))
            return easy[chosen] + shift + moved > 0

        return model(own[chosen]), model(0.0)

    return draw, truth


@pytest.mark.parametrize(
    ("seeds", "spread_of_seeds", "spread_of_cells"), [(3, 0.15, 0.3), (3, 0.02, 0.5), (6, 0.1, 0.3)]
)
def test_intervals_cover_the_true_difference_about_as_often_as_they_say(seeds, spread_of_seeds, spread_of_cells):
    draw, truth = population(spread_of_seeds, spread_of_cells)
    found = [paired_difference(*draw(seeds, 300)) for _ in range(100)]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert 90 <= covered <= 99  # of 100; the standard error is 2.2


def test_resampling_two_seeds_as_well_would_cover_too_rarely():
    """Why the deviation over seeds is drawn from Student's t."""
    draw, truth = population(0.15, 0.3)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        own, other = draw(2, 300)
        table = 100.0 * (own.astype(float) - other)
        seeds = rng.multinomial(2, np.ones(2) / 2, 300) / 2
        images = rng.multinomial(300, np.ones(300) / 300, 300) / 300
        low, high = np.percentile(((seeds @ table) * images).sum(1), [2.5, 97.5])
        covered += low <= truth <= high
    assert covered < 90


def test_the_same_results_give_the_same_interval():
    draw, _ = population(0.1, 0.3)
    own, other = draw(3, 500)
    assert paired_difference(own, other) == paired_difference(own, other)


def test_the_difference_turns_with_its_sides():
    draw, _ = population(0.1, 0.3)
    own, other = draw(4, 500)
    there, back = paired_difference(own, other), paired_difference(other, own)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high, abs=0.1 * (there.high - there.low))


def test_equal_models_differ_by_nothing():
    own = np.random.default_rng(0).random((3, 100)) > 0.2
    assert paired_difference(own, own) == Difference(0.0, 0.0, 0.0, 3, 100)


def test_one_seed_covers_the_images_only_and_says_so():
    draw, _ = population(0.1, 0.3)
    found = paired_difference(*draw(1, 500))
    assert (found.seeds, found.images) == (1, 500)
    assert str(found).endswith("(images only)")


def test_without_images_the_interval_is_students():
    found = difference_over_seeds([80.0, 81.0, 82.0], [78.0, 80.0, 79.0])
    half = 4.303 * 1.0 / np.sqrt(3)  # differences 2, 1, 3; t of two degrees of freedom
    assert found.mean == 2.0
    assert found.high - 2 == pytest.approx(half, rel=0.06)
    assert str(found).endswith("(seeds only)")


def test_fifty_thousand_images_take_less_than_a_second():
    rng = np.random.default_rng(0)
    own, other = rng.random((6, 50_000)) > 0.2, rng.random((6, 50_000)) > 0.3
    start = time.perf_counter()
    found = paired_difference(own, other)
    assert time.perf_counter() - start < 5
    assert found.better
    assert 9 < found.low < found.mean < found.high < 11
