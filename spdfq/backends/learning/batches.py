"""Which images an optimiser step uses, and the seed of what it draws at random."""

import torch
from torch import Tensor

from spdfq.backends.base import Calibration


def batch_rows(
    calibration: Calibration, batch: int, iteration: int, *purpose: str | int, among: Tensor | None = None
) -> Tensor | slice:
    """The indices of the images of an optimiser step: the next ones in the random order of the epoch.

    The last batch of an epoch may be smaller.

    Args:
        calibration: the images and the seed.
        batch: images in one step; if there are no more images than that, all of them are used.
        iteration: number of the step, counted from 0.
        purpose: of the seed stream.
        among: indices of the images to choose from; ``None`` for all.
    """
    count = len(calibration.images) if among is None else len(among)
    if count <= batch:
        return slice(None) if among is None else among
    epoch, step = divmod(iteration, -(-count // batch))
    order = torch.randperm(count, generator=calibration.runtime.generator(*purpose, epoch), device="cpu")
    chosen = order[step * batch : (step + 1) * batch].to(calibration.images.device)
    return chosen if among is None else among[chosen]


def drop_generator(calibration: Calibration, iteration: int, *purpose: str | int) -> torch.Generator:
    """The generator of an optimiser step's random drops, on the images' device.

    Its seed depends on the run's seed, the purpose and the iteration only.
    """
    seed = calibration.runtime.generator(*purpose, "drop", iteration).initial_seed()
    return torch.Generator(calibration.images.device).manual_seed(seed)
