"""Sources without optimisation: Gaussian noise, and real images for comparison."""

from pathlib import Path
from typing import Any

import torch
from attrs import define

from spdfq.errors import DataError
from spdfq.recipe.structure import component
from spdfq.registry import sources
from spdfq.runtime import Runtime
from spdfq.runtime.runtime import normal
from spdfq.synth.base import Source, SyntheticImages
from spdfq.teacher import Teacher


@sources.register("gaussian_noise")
@define(kw_only=True)
class GaussianNoise(Source):
    """Standard normal noise in the model's normalised space.

    Args:
        images: number of images.
    """

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Draw the images."""
        return SyntheticImages(images=noise(self.images, teacher, runtime.generator("noise")))


def noise(count: int, teacher: Teacher, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise ``[count, C, H, W]`` on the CPU, in the teacher's input size."""
    return normal(generator, count, *teacher.input_size)


@sources.register("real")
@define(kw_only=True)
class RealImages(Source):
    """Real images drawn at random from a labelled dataset, to compare data-free images with.

    Args:
        images: number of images.
        dataset: where they come from; must not be the images that the accuracy is measured on.
    """

    dataset: Any = component("dataset")

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Draw the images. An image that cannot be read is replaced by the next one of the draw.

        Raises:
            DataError: the dataset holds fewer readable images than ``images``.
        """
        available = len(self.dataset)
        if available < self.images:
            raise DataError(f"synthesis.images: {self.images} asked for, but the dataset holds {available}; lower it")
        order = torch.randperm(available, generator=runtime.generator("real"), device="cpu").tolist()
        found: list[torch.Tensor] = []
        damaged: list[str] = []
        while missing := self.images - sum(map(len, found)):
            seen = self.images - missing + len(damaged)
            if seen == available:
                raise DataError(
                    f"synthesis.images: {self.images} asked for, but only {self.images - missing} of the dataset's "
                    f"{available} images can be read (not {damaged[0]}, for example); lower it"
                )
            for batch in self.dataset.batches(teacher, 64, order[seen : seen + missing]):
                found.append(batch.images)
                damaged.extend(batch.damaged)
        return SyntheticImages(images=torch.cat(found), damaged=tuple(damaged))
