"""Pixels optimised in coordinates in which natural images are white: frequencies and colours apart."""

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.registry import optimizers
from spdfq.synth.optimizers import Adam

# how the colours of natural photographs vary together (ImageNet, published with the paper below); rows red, green, blue
_COLORS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@optimizers.register("spectral_adam")
@frozen(kw_only=True)
class SpectralAdam(Adam):
    """Adam on frequencies and decorrelated colours instead of pixels.

    From feature visualization (Olah et al., Distill 2017, doi:10.23915/distill.00007); no paper of this field has it.
    The images are ``x = M z``: M weighs each frequency f by ``1 / f**power``, as natural images do, and gives three
    channels the colours of natural photographs; both so that white z makes x of variance 1. Adam works on z. So a step
    moves what is smooth and grey the most, and noise hardly at all. Of natural images it knows this power law and a
    published 3×3 matrix of ImageNet's colours, nothing else. The start is M applied to white noise. Images of other
    than three channels have their frequencies weighed alone.

    Args:
        lr: learning rate of z, in the units of normalised pixels.
        betas: decay of the first and second moment.
        power: how fast the weight of a frequency falls; 0 leaves the frequencies alike.
    """

    power: float = field(default=1.0, validator=[validators.ge(0.0), validators.le(4.0)])

    def start(self, noise: Tensor) -> Tensor:
        """``M z`` for white z of the images' shape."""
        return Coordinates(noise, self.power).pixels(noise)

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """An optimiser of one tensor."""
        return _Spectral(images, self.lr, self.betas, Coordinates(images, self.power))


class Coordinates:
    """The linear map M from white coordinates ``[B, C, H, W]`` to pixels of the same shape.

    Args:
        images: of the shape, device and dtype at hand.
        power: how fast the weight of a frequency falls.
    """

    def __init__(self, images: Tensor, power: float) -> None:
        channels, height, width = images.shape[1:]
        lowest = 1 / max(height, width)
        rows = torch.fft.fftfreq(height, dtype=torch.float64).unsqueeze(1)
        columns = torch.fft.fftfreq(width, dtype=torch.float64)
        weights = (rows.square() + columns.square()).sqrt().clamp(min=lowest) ** -power
        weights = weights / weights.square().mean().sqrt()
        colors = torch.tensor(_COLORS, dtype=torch.float64) if channels == 3 else torch.eye(channels)
        colors = colors / colors.square().sum(1).mean().sqrt()
        self.size = (height, width)
        self.weights = weights[:, : width // 2 + 1].to(images)
        self.colors = colors.to(images)

    def pixels(self, coordinates: Tensor) -> Tensor:
        """``M z``."""
        return self._weighed(torch.einsum("ij,bjhw->bihw", self.colors, coordinates))

    def gradient(self, pixels: Tensor) -> Tensor:
        """``Mᵀ g``: the gradient of the coordinates from that of the pixels."""
        return torch.einsum("ji,bjhw->bihw", self.colors, self._weighed(pixels))

    def _weighed(self, tensor: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(tensor) * self.weights, s=self.size)


class _Spectral(torch.optim.Adam):
    """Adam on z. M is linear: a step of z moves the images by M of it, so they are all that has to be kept."""

    def __init__(self, images: Tensor, lr: float, betas: tuple[float, float], coordinates: Coordinates) -> None:
        super().__init__([images], lr=lr, betas=betas, foreach=False)
        self.images, self.coordinates = images, coordinates

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step; ``images.grad`` is left as the gradient of the coordinates."""
        before = self.images.detach().clone()
        if self.images.grad is not None:
            self.images.grad = self.coordinates.gradient(self.images.grad)
        super().step()
        self.images.copy_(before + self.coordinates.pixels(self.images - before))
