"""What every source of calibration images gives, and how it is stored."""

from pathlib import Path
from typing import ClassVar

import torch
from attrs import define, field, validators
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spdfq.models import Teacher
from spdfq.runtime import Runtime


@define(eq=False, kw_only=True)
class SyntheticImages:
    """Calibration images and what is known of how they came about.

    Args:
        images: float32 ``[n, C, H, W]``, normalised for the teacher.
        boxes: ``[M, 4]`` crops (top, left, height, width) in pixels.
        owners: ``[M]`` the image each crop belongs to.
        labels: ``[M]`` the class of each crop.
        curves: ``[groups, iterations, columns]`` loss values.
        columns: names of the columns of ``curves``.
        prior: ``[m, blocks, h, w]`` attention priors of the first images' first head; empty where there are none.
        reached: likewise, the attention that was reached.
        first_block: number of the first block of ``prior``.
    """

    images: Tensor
    boxes: Tensor = field(factory=lambda: torch.zeros(0, 4, dtype=torch.long))
    owners: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.long))
    labels: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.long))
    curves: Tensor = field(factory=lambda: torch.zeros(0, 0, 0))
    columns: tuple[str, ...] = ()
    prior: Tensor = field(factory=lambda: torch.zeros(0))
    reached: Tensor = field(factory=lambda: torch.zeros(0))
    first_block: int = 0

    _TENSORS: ClassVar = ("images", "boxes", "owners", "labels", "curves", "prior", "reached")

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self._TENSORS}
        metadata = {"columns": ",".join(self.columns), "first_block": str(self.first_block)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "SyntheticImages":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in cls._TENSORS}
        columns = tuple(name for name in metadata["columns"].split(",") if name)
        return cls(**tensors, columns=columns, first_block=int(metadata["first_block"]))


@define(kw_only=True)
class Source:
    """Base class of image sources.

    Args:
        images: how many images.
    """

    images: int = field(default=32, validator=validators.ge(1))

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Make the images; what a killed call left in ``folder`` is taken up again."""
        raise TypeError(f"{type(self).__name__} does not define synthesize")
