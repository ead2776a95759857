"""The base class of image sources, and the images that a source returns."""

import json
from pathlib import Path
from typing import ClassVar

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.errors import ComponentError, DataError
from spdfq.recipe.structure import Checked
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.teacher import Teacher

_REMEDY = "synthesise them again, or use --fresh"


@define(eq=False, kw_only=True)
class SyntheticImages:
    """Calibration images, and how they were made.

    Args:
        images: float32 ``[n, C, H, W]``, normalised for the teacher.
        boxes: ``[M, 4]`` top, left, height and width of each crop in pixels.
        owners: ``[M]`` index of the image that each crop belongs to.
        labels: ``[M]`` class of each crop.
        curves: ``[groups, iterations, columns]`` loss values.
        columns: names of the columns of ``curves``.
        prior: ``[m, blocks, h, w]`` attention priors of the first images' first head; empty if there are none.
        reached: the attention that was reached, of the same shape.
        first_block: index of the first block of ``prior``.
        damaged: real images that were drawn but could not be read, with reasons.
    """

    images: Tensor
    boxes: Tensor = field(factory=lambda: torch.zeros(0, 4, dtype=torch.long, device="cpu"))
    owners: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu"))
    labels: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu"))
    curves: Tensor = field(factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float32, device="cpu"))
    columns: tuple[str, ...] = ()
    prior: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))
    reached: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))
    first_block: int = 0
    damaged: tuple[str, ...] = ()

    _TENSORS: ClassVar = ("images", "boxes", "owners", "labels", "curves", "prior", "reached")

    def save(self, path: Path) -> None:
        """Write one safetensors file. A crash leaves the file as it was before the call."""
        metadata = {"columns": json.dumps(self.columns), "first_block": str(self.first_block)}
        metadata |= {"damaged": json.dumps(self.damaged)} if self.damaged else {}
        write_tensors(path, {name: getattr(self, name) for name in self._TENSORS}, metadata)

    @classmethod
    def load(cls, path: Path) -> "SyntheticImages":
        """Load what `save` wrote.

        Raises:
            DataError: the file is missing, damaged or not of this kind.
        """
        tensors, metadata = read_tensors(path, _REMEDY)
        try:
            return cls(
                **{name: tensors[name] for name in cls._TENSORS},
                columns=tuple(json.loads(metadata["columns"])),
                first_block=int(metadata["first_block"]),
                damaged=tuple(json.loads(metadata.get("damaged", "[]"))),
            )
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: does not hold synthetic images of spdfq ({error}); {_REMEDY}") from None


@define(kw_only=True)
class Source(Checked):
    """Base class of image sources. A subclass defines `synthesize`.

    Args:
        images: number of images.
    """

    images: int = field(default=32, validator=[validators.ge(1), validators.le(10**9)])

    @property
    def needs_student(self) -> bool:
        """Whether `synthesize` takes ``student``, which makes quantized models with the recipe's own back-end."""
        return False

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that these images cannot be made from, before anything is computed; by default, refuse none.

        Raises:
            RecipeError: every reason found.
            SpdfqError: the model lacks something that the images need.
        """

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Make the images.

        Args:
            teacher: on the runtime's device.
            runtime: device, precision, seeds and progress.
            folder: where unfinished work is stored and continued; nothing is stored without it.
        """
        raise ComponentError(f"{type(self).__name__} does not define synthesize")
