"""An ``.npz`` file of calibration images: plain arrays, no pickled objects."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spdfq.errors import DataError, writing

Array = NDArray[np.float32]
NAMES = ("images", "mean", "std", "size")
_REMEDY = "write it again: spdfq images RUN --to FILE.npz"


def write_npz(path: Path, images: Any, mean: Any, std: Any) -> None:
    """Write the arrays ``images``, ``mean``, ``std`` and ``size`` (height and width), completely or not at all."""
    from spdfq.runtime.files import replace_file

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # by its name, NumPy would add a suffix
            np.savez(file, images=images, mean=mean, std=std, size=np.asarray(images.shape[2:], dtype=np.int64))

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays ``images``, ``mean`` and ``std`` of such a file.

    Raises:
        DataError: missing, damaged, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in NAMES}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_REMEDY}") from None
    except KeyError as error:
        raise DataError(f"{path}: has no array {error}; {_REMEDY}") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a file of calibration images ({str(error).partition(chr(10))[0]}); {_REMEDY}"
        ) from None
    size = found.pop("size")
    if list(size) != list(found["images"].shape[2:]):
        raise DataError(f"{path}: size is {size.tolist()}, its images are {list(found['images'].shape)}; {_REMEDY}")
    return found
