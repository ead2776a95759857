"""Calibration images as an array, with the description that other tools need."""

from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field

from spdfq.calibration_data.arrays import Array, read_npz, write_npz
from spdfq.calibration_data.pictures import Rounding, read_pictures, write_pictures
from spdfq.calibration_data.readers import ArrayItems, OnnxRuntimeReader, TorchBatches
from spdfq.errors import DataError, SpdfqError, shown
from spdfq.extras import require


def _array(images: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return images.detach().cpu().numpy() if hasattr(images, "detach") else images


def _of_channels(values: Any) -> Array:
    try:
        return np.asarray(values, dtype=np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise DataError(f"mean and std: expected a number for each channel, got {shown(values)}") from None


@define(eq=False, kw_only=True)
class CalibrationImages:
    """Calibration images for tools that calibrate on an array, on a folder of pictures, or through a reader.

    Args:
        images: float32 ``[n, C, H, W]``, normalised: an array, or a tensor such as `spdfq.synthesize` returns.
        mean: of each channel, of pixels in 0..1; ``teacher.mean``.
        std: of each channel, of pixels in 0..1; ``teacher.std``.
        source: where they come from, for error messages.

    Raises:
        DataError: not images of that shape, or not numbers.
    """

    images: Array = field(converter=_array, repr=False)
    mean: Array = field(converter=_of_channels)
    std: Array = field(converter=_of_channels)
    source: str = field(default="images", repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.images, np.ndarray) or self.images.dtype != np.float32 or self.images.ndim != 4:
            raise DataError(f"{self.source}: expected float32 images [n, C, H, W], got {_kind(self.images)}")
        if not self.images.size:
            raise DataError(f"{self.source}: holds no images")
        channels = self.images.shape[1]
        if {len(self.mean), len(self.std)} != {channels}:
            raise DataError(
                f"{self.source}: mean has {len(self.mean)} values and std {len(self.std)}, the images have {channels} "
                "channels; give one for each"
            )
        if not (np.isfinite(self.images).all() and np.isfinite(self.mean).all() and (self.std > 0).all()):
            raise DataError(f"{self.source}: has values that are NaN or infinite, or a std that is not above 0")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationImages":
        """Load what `save` wrote: an ``.npz`` file, or a folder of pictures. Nothing is unpickled.

        Raises:
            DataError: missing, damaged, or not written by `save`.
        """
        path = Path(path)
        found = read_pictures(path) if path.is_dir() else read_npz(path)
        return cls(**found, source=str(path))

    def save(self, path: str | Path) -> Rounding | None:
        """Write an ``.npz`` file, or a folder of 8-bit PNG pictures if the path has no suffix or is a folder.

        The file holds ``images``, ``mean``, ``std`` and ``size`` (height and width). The pictures have the pixels
        before the normalisation, and ``images.json`` beside them has the rest. A folder that `save` wrote is replaced.

        Returns:
            What the pictures lost; ``None`` for a file, which loses nothing.

        Raises:
            DataError: another suffix, a folder of something else, channels that no picture has, or no room.
        """
        target = Path(path)
        as_folder = target.is_dir() or not target.suffix or str(path).endswith(("/", "\\"))
        if as_folder:
            return write_pictures(target, self.images, self.mean, self.std)
        if target.suffix != ".npz":
            raise DataError(f"{path}: give a file that ends in .npz, or a folder for PNG pictures")
        write_npz(target, self.images, self.mean, self.std)
        return None

    def onnxruntime_reader(self, input_name: str, batch: int = 1) -> OnnxRuntimeReader:
        """A `CalibrationDataReader` for onnxruntime's ``quantize_static``; each call makes one that starts anew.

        Args:
            input_name: of the model: ``session.get_inputs()[0].name``.
            batch: images of each run.
        """
        return OnnxRuntimeReader(self.images, input_name, _positive("batch", batch))

    def nncf_dataset(self, input_name: str | None = None, batch: int = 1) -> Any:
        """An ``nncf.Dataset`` of arrays, for models of OpenVINO and ONNX; for torch, wrap `torch_batches` in one.

        Args:
            input_name: of an ONNX model, whose items are ``{input_name: array}``; OpenVINO takes the array alone.
            batch: images of each item.

        Raises:
            SpdfqError: NNCF is not installed.
        """
        batch = _positive("batch", batch)
        require("nncf_dataset", ("nncf",), "nncf")
        import nncf

        return nncf.Dataset(ArrayItems(self.images, input_name, batch))

    def torch_batches(self, batch: int = 1) -> TorchBatches:
        """Tensors ``[b, C, H, W]`` one after the other, as often as asked, for ModelOpt, torchao and your own loop.

        Args:
            batch: images of each tensor.
        """
        return TorchBatches(self.images, _positive("batch", batch))


def _positive(what: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise SpdfqError(f"{what}: expected a whole number of images, at least 1, got {shown(value)}")
    return value


def _kind(images: Any) -> str:
    return f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else shown(images)
