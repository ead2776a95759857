"""Which images an optimiser step uses, and the seed of what it draws at random."""

from functools import lru_cache

import torch
from torch import Tensor

from spdfq.backends.base import Calibration
from spdfq.runtime import generator


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
    order = _order(calibration.runtime.seed, (*purpose, epoch), count, calibration.images.device)
    chosen = order[step * batch : (step + 1) * batch]
    return chosen if among is None else among[chosen]


@lru_cache(maxsize=1)
def _order(seed: int, purpose: tuple[str | int, ...], count: int, device: torch.device) -> Tensor:
    """The random order of an epoch; kept, so that it is drawn and copied to the device once and not in every step."""
    return torch.randperm(count, generator=generator(seed, *purpose), device="cpu").to(device)


def drop_generator(calibration: Calibration, iteration: int, *purpose: str | int) -> torch.Generator:
    """The generator of an optimiser step's random drops, on the images' device.

    Its seed depends on the run's seed, the purpose and the iteration only.
    """
    seed = calibration.runtime.generator(*purpose, "drop", iteration).initial_seed()
    return torch.Generator(calibration.images.device).manual_seed(seed)
