"""Optimisation in coordinates that decorrelate natural images: by frequency and by colour."""

import torch
from attrs import field, frozen, validators
from einops import einsum, rearrange
from torch import Tensor

from spdfq.registry import optimizers
from spdfq.synth.optimizers import Adam, check_pixels

# square root of the colour covariance of ImageNet, published with the paper below; rows are red, green and blue
_COLORS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@optimizers.register("spectral_adam")
@frozen(kw_only=True)
class SpectralAdam(Adam):
    """Adam on frequencies and decorrelated colours instead of pixels.

    From feature visualization (Olah et al., Distill 2017, doi:10.23915/distill.00007); no paper on data-free
    quantization uses it. The images are ``x = M z``. M multiplies each frequency f by ``1 / f**power``, the spectrum of
    natural images, and mixes three channels so that their colours are those of natural photographs. White noise z gives
    x of variance 1. Adam optimises z. A step therefore changes smooth and grey parts the most, and noise hardly at all.
    The start is M applied to white noise. All that M knows of natural images is this power law and a published 3×3
    matrix of ImageNet's colours. Without three channels, only frequencies are weighted.

    Args:
        lr: learning rate of z, in the units of normalised pixels.
        betas: decay of the first and second moment.
        power: how fast the weight of a frequency falls; 0 gives all frequencies the same weight.
    """

    power: float = field(default=1.0, validator=[validators.ge(0.0), validators.le(4.0)])

    def start(self, noise: Tensor) -> Tensor:
        """``M z`` for white noise z ``[B, C, H, W]``."""
        return Coordinates(noise, self.power).pixels(noise)

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """A torch optimizer of one tensor."""
        check_pixels(images)
        return _SpectralAdam(images, self.lr, self.betas, Coordinates(images, self.power))


class Coordinates:
    """The linear map M from white coordinates ``[B, C, H, W]`` to pixels of the same shape.

    Args:
        images: gives the shape, the device and the dtype.
        power: how fast the weight of a frequency falls.
    """

    def __init__(self, images: Tensor, power: float) -> None:
        channels, height, width = images.shape[1:]
        lowest = 1 / max(height, width)
        rows = rearrange(torch.fft.fftfreq(height, dtype=torch.float64, device="cpu"), "h -> h 1")
        columns = torch.fft.fftfreq(width, dtype=torch.float64, device="cpu")
        weights = (rows.square() + columns.square()).sqrt().clamp(min=lowest) ** -power
        weights = weights / weights.square().mean().sqrt()
        rows_of_three = torch.tensor(_COLORS, dtype=torch.float64, device="cpu")
        colors = rows_of_three if channels == 3 else torch.eye(channels, dtype=torch.float64, device="cpu")
        colors = colors / colors.square().sum(1).mean().sqrt()
        self.size = (height, width)
        self.weights = weights[:, : width // 2 + 1].to(images)
        self.colors = colors.to(images)

    def pixels(self, coordinates: Tensor) -> Tensor:
        """``M z``."""
        return self._filtered(einsum(self.colors, coordinates, "out c, b c h w -> b out h w"))

    def gradient(self, pixels: Tensor) -> Tensor:
        """``Mᵀ g``: the gradient with respect to the coordinates, from that with respect to the pixels."""
        return einsum(self.colors, self._filtered(pixels), "c out, b c h w -> b out h w")

    def _filtered(self, tensor: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(tensor) * self.weights, s=self.size)


class _SpectralAdam(torch.optim.Adam):
    """Adam on z. Because M is linear, a step of z moves the images by M times the step, so z need not be stored."""

    def __init__(self, images: Tensor, lr: float, betas: tuple[float, float], coordinates: Coordinates) -> None:
        super().__init__([images], lr=lr, betas=betas, foreach=False)
        self.images, self.coordinates = images, coordinates

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Make one step. Afterwards ``images.grad`` is the gradient with respect to the coordinates."""
        before = self.images.detach().clone()
        if self.images.grad is not None:
            self.images.grad = self.coordinates.gradient(self.images.grad)
        super().step()
        self.images.copy_(before + self.coordinates.pixels(self.images - before))
