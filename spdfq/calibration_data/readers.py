"""What other tools iterate over: onnxruntime's reader, NNCF's items, and tensors."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field

from spdfq.calibration_data.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False)
class OnnxRuntimeReader:
    """onnxruntime's ``CalibrationDataReader``: a dictionary for each run, then ``None``.

    onnxruntime takes every class with a method ``get_next`` for one, so it need not be installed.

    Args:
        images: float32 ``[n, C, H, W]``.
        input_name: of the model.
        batch: images of each run; the last one may have fewer.
    """

    images: Array = field(repr=False)
    input_name: str
    batch: int = 1
    _next: int = field(default=0, init=False)
    _stop: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._stop = len(self)

    def get_next(self) -> dict[str, Array] | None:
        """The images of the next run by the name of the input; ``None`` when all were given."""
        if self._next >= self._stop:
            return None
        start, self._next = self._next * self.batch, self._next + 1
        return {self.input_name: self.images[start : start + self.batch]}

    def rewind(self) -> None:
        """Start again with the first image."""
        self.set_range(0, len(self))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the runs from one index to before another, as ``CalibStridedMinMax`` asks for."""
        self._next, self._stop = start_index, min(end_index, len(self))

    def __len__(self) -> int:
        """Number of runs."""
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self

    def __next__(self) -> dict[str, Array]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


@define(eq=False)
class ArrayItems(Sequence[Any]):
    """The source of an ``nncf.Dataset``: arrays, or dictionaries of one, with a length and random access.

    Args:
        images: float32 ``[n, C, H, W]``.
        input_name: of the model; ``None`` for arrays alone.
        batch: images of each item.
    """

    images: Array = field(repr=False)
    input_name: str | None
    batch: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __getitem__(self, index: Any) -> Any:
        start = range(len(self))[index] * self.batch  # raises the IndexError that ends an iteration
        item = self.images[start : start + self.batch]
        return item if self.input_name is None else {self.input_name: item}


@define(eq=False)
class TorchBatches:
    """Tensors float32 ``[b, C, H, W]`` on the CPU; every iteration starts anew.

    Args:
        images: float32 ``[n, C, H, W]``.
        batch: images of each tensor; the last one may have fewer.
    """

    images: Array = field(repr=False)
    batch: int = 1

    def __len__(self) -> int:
        """Number of tensors."""
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> "Iterator[Tensor]":
        import torch

        for start in range(0, len(self.images), self.batch):
            yield torch.tensor(self.images[start : start + self.batch], device="cpu")
