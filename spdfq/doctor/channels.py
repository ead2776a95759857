"""The axes of a site's channels and tokens, and which of them stand out."""

import torch
from attrs import define, field, frozen
from einops import rearrange
from torch import Tensor

from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import BRANCH, INPUT, KEY, LAYER_NORM, QUERY, RESIDUAL, VALUE, WEIGHT, input_site

OUTLIER = 8.0
"""An outlier's largest absolute value is so many times that of the median channel or token."""
_LISTED = 5


@frozen
class Outlier:
    """A channel or token with much larger values than the others.

    Args:
        index: its position; of queries, keys and values, ``head * d + channel``.
        ratio: its largest absolute value, over that of the median one.
    """

    index: int
    ratio: float


def as_channels(model: QuantizedModel, name: str, tensor: Tensor) -> Tensor | None:
    """The values of a site with its channels on the last axis ``[..., C]``; ``None`` where there are no channels.

    The channels of a weight are its rows.
    """
    kind = model.sites[name].kind
    if kind == WEIGHT:
        return rearrange(tensor, "channels ... -> (...) channels")
    if kind in (QUERY, KEY, VALUE) and tensor.ndim == 4:
        return rearrange(tensor, "b heads n d -> b n (heads d)")
    if kind not in (INPUT, LAYER_NORM, BRANCH, RESIDUAL, QUERY, KEY, VALUE) or tensor.ndim < 2:
        return None
    return tensor.movedim(1, -1) if name in convolved(model) else tensor


def convolved(model: QuantizedModel) -> set[str]:
    """Sites that enter a convolution, so that their channels are on axis 1."""
    weights = [site for site in model.sites.values() if site.kind == WEIGHT]
    return {input_site(site.name) for site in weights if len(site.shape) > 2}


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.float32, device="cpu")


@define(eq=False)
class ChannelRanges:
    """The range ``[C]`` of each channel, and the largest value ``[n]`` of each token, over several batches."""

    low: Tensor = field(factory=_none, init=False)
    high: Tensor = field(factory=_none, init=False)
    tokens: Tensor = field(factory=_none, init=False)

    def add(self, values: Tensor) -> None:
        """Add values ``[..., C]``; those of ``[b, n, C]`` have tokens."""
        low, high = values.reshape(-1, values.shape[-1]).aminmax(dim=0)
        known = len(self.low) > 0
        self.low = torch.minimum(self.low, low) if known else low
        self.high = torch.maximum(self.high, high) if known else high
        if values.ndim == 3:
            tokens = values.abs().amax((0, 2))
            self.tokens = torch.maximum(self.tokens, tokens) if len(self.tokens) == len(tokens) else tokens

    @property
    def channels(self) -> int:
        """Number of channels; 0 before values with channels were added."""
        return len(self.low)

    @property
    def constant(self) -> Tensor:
        """Which channels had one value only, bool ``[C]``."""
        return self.low == self.high

    def outlier_channels(self) -> tuple[Outlier, ...]:
        """The channels that stand out, largest first, at most five."""
        return _outliers(torch.maximum(-self.low, self.high))

    def outlier_tokens(self) -> tuple[Outlier, ...]:
        """The tokens that stand out, largest first, at most five."""
        return _outliers(self.tokens) if len(self.tokens) else ()


def _outliers(largest: Tensor) -> tuple[Outlier, ...]:
    ratios = largest / largest.median().clamp(min=1e-12)
    order = ratios.argsort(descending=True)[:_LISTED].tolist()
    return tuple(Outlier(index, float(ratios[index])) for index in order if ratios[index] > OUTLIER)
