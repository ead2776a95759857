"""Random orthogonal matrices."""

import pytest
import torch

from spdfq.backends.transforms.hadamard import hadamard, orthogonal
from spdfq.runtime.runtime import generator

HADAMARD = [1, 2, 4, 8, 12, 16, 20, 24, 40, 48, 64, 80, 96, 192, 320, 384]
OTHERS = [3, 5, 7, 10, 28, 36, 52, 100]


@pytest.mark.parametrize("size", [*HADAMARD, *OTHERS])
def test_they_are_orthogonal(size):
    found = orthogonal(size, generator(0, "test"))
    assert found.dtype == torch.float64
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, identity, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", HADAMARD)
def test_known_sizes_spread_every_channel_evenly(size):
    found = orthogonal(size, generator(0, "test"))
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5), atol=1e-15, rtol=0)


@pytest.mark.parametrize("size", OTHERS)
def test_other_sizes_have_no_hadamard_matrix_here(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [7, 12])
def test_the_generator_decides(size):
    first, again, other = (orthogonal(size, generator(seed, "test")) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
