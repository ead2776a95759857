"""Sources without optimisation: noise, and real images as the reference."""

from pathlib import Path
from typing import Any

import torch
from attrs import define

from spdfq.errors import DataError
from spdfq.recipe.structure import component
from spdfq.registry import sources
from spdfq.runtime import Runtime
from spdfq.synth.base import Source, SyntheticImages
from spdfq.teacher import Teacher


@sources.register("gaussian_noise")
@define(kw_only=True)
class GaussianNoise(Source):
    """Standard normal noise in the model's normalised space.

    Args:
        images: how many images.
    """

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Draw the images."""
        return SyntheticImages(images=noise(self.images, teacher, runtime.generator("noise")))


def noise(count: int, teacher: Teacher, generator: torch.Generator) -> torch.Tensor:
    """Standard normal ``[count, C, H, W]`` on the CPU."""
    return torch.randn(count, *teacher.input_size, generator=generator)


@sources.register("real")
@define(kw_only=True)
class RealImages(Source):
    """Real images drawn at random from a labelled dataset: the row that data-free ones are compared with.

    Args:
        images: how many images.
        dataset: where they come from; not the images the accuracy is measured on.
    """

    dataset: Any = component("dataset")

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Draw the images; for one that cannot be read, the next of the draw."""
        available = len(self.dataset)
        if available < self.images:
            raise DataError(f"synthesis.images: {self.images} asked for, but the dataset holds {available}")
        order = torch.randperm(available, generator=runtime.generator("real")).tolist()
        found: list[torch.Tensor] = []
        damaged: list[str] = []
        while missing := self.images - sum(map(len, found)):
            seen = self.images - missing + len(damaged)
            if seen == available:
                raise DataError(
                    f"synthesis.images: {self.images} asked for, but only {self.images - missing} of the dataset's "
                    f"{available} images can be read; the first that cannot is {damaged[0]}"
                )
            for batch in self.dataset.batches(teacher, 64, order[seen : seen + missing]):
                found.append(batch.images)
                damaged.extend(batch.damaged)
        return SyntheticImages(images=torch.cat(found), damaged=tuple(damaged))
