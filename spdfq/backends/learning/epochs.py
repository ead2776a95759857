"""Which images an optimiser step sees."""

import torch
from torch import Tensor

from spdfq.backends.base import Calibration


def batch_rows(calibration: Calibration, batch: int, iteration: int, *purpose: str | int) -> Tensor | slice:
    """The images of a step: a part of this epoch's random order, the last part possibly smaller.

    Args:
        calibration: the images and the seed.
        batch: images in one step; where there are no more, they are all taken.
        iteration: counted from 0.
        purpose: of the seed stream.
    """
    count = len(calibration.images)
    if count <= batch:
        return slice(None)
    epoch, step = divmod(iteration, -(-count // batch))
    order = torch.randperm(count, generator=calibration.runtime.generator(*purpose, epoch))
    return order[step * batch : (step + 1) * batch].to(calibration.images.device)


def noise(calibration: Calibration, iteration: int, *purpose: str | int) -> torch.Generator:
    """A generator on the images' device for what a step draws, a function of seed, purpose and iteration."""
    seed = calibration.runtime.generator(*purpose, "drop", iteration).initial_seed()
    return torch.Generator(calibration.images.device).manual_seed(seed)
