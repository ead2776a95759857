"""Which test images a model classifies correctly: one bit for each image, as text; and which images these were."""

import base64
import binascii
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spdfq.errors import DataError
from spdfq.recipe import digest

Hits = npt.NDArray[np.bool_]


def packed(logits: Tensor, labels: Tensor) -> str:
    """One bit for each image, in the order of the dataset: whether the largest logit is that of the label.

    Args:
        logits: ``[n, K]``.
        labels: int64 ``[n]``.

    Returns:
        The bits in bytes, the first image in the highest bit, in Base64.
    """
    return base64.b64encode(np.packbits((logits.argmax(1) == labels).cpu().numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> Hits:
    """What `packed` wrote.

    Args:
        text: from `packed`.
        images: number of images.

    Returns:
        bool ``[images]``.

    Raises:
        DataError: the text is not that of as many images.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("the per-image results are not Base64") from None
    if len(data) != (images + 7) // 8:
        raise DataError(f"the per-image results are {len(data)} bytes, which is not {images} bits")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=images).astype(np.bool_)


def images_digest(dataset: Any, labels: Tensor, damaged: tuple[str, ...]) -> str:
    """A hash of the test images that were read and of their order, the same on every machine.

    Args:
        dataset: the labelled images.
        labels: int64 ``[n]``, of the images that could be read.
        damaged: the images that could not be read.
    """
    unread = [line.partition(" (")[0] for line in damaged]  # without the reasons, which differ between machines
    return digest(dataset.contents(), labels.tolist(), unread)
