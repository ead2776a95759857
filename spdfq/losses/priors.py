"""Attention priors: random maps of one or more bumps on the token grid (SPDFQ, arXiv 2412.16553, section 3.2)."""

import math
from typing import Literal

import torch
from attrs import field, frozen, validators
from einops import rearrange, repeat
from torch import Tensor

from spdfq.errors import ComponentError
from spdfq.recipe.structure import Checked
from spdfq.registry import priors
from spdfq.runtime.arguments import check_generator, check_size, check_whole
from spdfq.runtime.runtime import uniform

Combine = Literal["sum", "max"]
# below this, the square of a distance divided by sigma overflows float32
_NARROWEST = 1e-6


@frozen
class Prior(Checked):
    """Base class of attention priors. A subclass defines `sample`."""

    def sample(self, count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw maps.

        Args:
            count: number of maps.
            grid: token grid ``(h, w)``.
            generator: CPU generator. The result must depend on the arguments and on nothing else.

        Returns:
            float32 ``[count, h*w]``, non-negative, each map summing to 1.

        Raises:
            SpdfqError: an argument of another type.
        """
        raise ComponentError(f"{type(self).__name__} does not define sample")


def _ordered_pair(_: object, __: object, value: tuple[float, float]) -> None:
    if not _NARROWEST <= value[0] <= value[1] < math.inf:
        raise ValueError(f"expected two numbers from {_NARROWEST} up, the second at least the first, got {list(value)}")


@frozen
class MixturePrior(Prior):
    """A mixture of ``k ~ U{1..max_components}`` elliptic bumps of equal height at uniform positions on the grid.

    A subclass defines `log_profile`.

    Args:
        max_components: largest number of bumps in one map (5 in the paper).
        sigma: range of the standard deviation along each axis, in sides of the grid (unpublished).
        correlation: the correlation of the two axes is drawn from ``-c..c`` (unpublished).
        combine: how overlapping bumps combine (unpublished).
    """

    max_components: int = field(default=5, validator=validators.ge(1))
    sigma: tuple[float, float] = field(default=(0.05, 0.25), validator=_ordered_pair, kw_only=True)
    correlation: float = field(default=0.5, validator=[validators.ge(0.0), validators.lt(1.0)], kw_only=True)
    combine: Combine = field(default="sum", kw_only=True)

    def log_profile(self, squared: Tensor) -> Tensor:
        """Logarithm of a bump's height at a squared Mahalanobis distance from its centre; 0 at the centre."""
        raise ComponentError(f"{type(self).__name__} does not define log_profile")

    def sample(self, count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw maps; see `Prior.sample`."""
        check_whole("count", count, 1)
        check_size("grid", grid)
        check_generator(generator)
        shape = (count, self.max_components, 1)
        draw = uniform(generator, 5, *shape)
        low, high = self.sigma
        spread_y, spread_x = low + (high - low) * draw[2], low + (high - low) * draw[3]
        rho = self.correlation * (2 * draw[4] - 1)
        y, x = _centres(grid)
        dy, dx = (y - draw[0]) / spread_y, (x - draw[1]) / spread_x
        heights = self.log_profile((dy**2 + dx**2 - 2 * rho * dy * dx) / (1 - rho**2))
        used = torch.randint(1, self.max_components + 1, (count, 1, 1), generator=generator, device="cpu")
        unused = rearrange(torch.arange(self.max_components, device="cpu"), "bumps -> 1 bumps 1") >= used
        heights = heights.masked_fill(unused, -math.inf)
        maps = heights.logsumexp(1) if self.combine == "sum" else heights.amax(1)
        # normalised by a softmax of logarithms: on a coarse grid a narrow bump underflows to zero at every token
        return maps.softmax(-1)


def _centres(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column ``[h*w]`` of the centre of each token, in sides of the grid."""
    rows, columns = ((torch.arange(side, dtype=torch.float32, device="cpu") + 0.5) / side for side in grid)
    return repeat(rows, "h -> (h w)", w=grid[1]), repeat(columns, "w -> (h w)", h=grid[0])


@priors.register("gaussian_mixture", paper="arXiv:2412.16553")
@frozen
class GaussianMixturePrior(MixturePrior):
    """Mixture of two-dimensional Gaussians, the prior of SPDFQ.

    Args:
        max_components: largest number of Gaussians in one map (5 in the paper).
        sigma: range of the standard deviation along each axis, in sides of the grid (unpublished).
        correlation: the correlation of the two axes is drawn from ``-c..c`` (unpublished).
        combine: how overlapping Gaussians combine (unpublished).
    """

    def log_profile(self, squared: Tensor) -> Tensor:
        """``-d²/2``."""
        return -0.5 * squared


@priors.register("laplace", paper="arXiv:2412.16553")
@frozen
class LaplacePrior(MixturePrior):
    """Mixture of elliptic Laplace bumps, sharper at the centre and heavier in the tails.

    Args:
        max_components: largest number of bumps in one map.
        sigma: range of the width along each axis, in sides of the grid (unpublished); the standard deviation of a bump
            is 1.22 times it.
        correlation: the correlation of the two axes is drawn from ``-c..c`` (unpublished).
        combine: how overlapping bumps combine (unpublished).
    """

    def log_profile(self, squared: Tensor) -> Tensor:
        """``-√2 d``."""
        return -(2.0**0.5) * squared.clamp(min=0).sqrt()
