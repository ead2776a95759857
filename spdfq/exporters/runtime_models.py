"""The base class of exported files that run: a module, and what the runtime made of the products."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


class RuntimeModel(nn.Module, ABC):
    """An exported file in a runtime, as a module from normalised images to logits on the CPU.

    A child class opens a file by its path alone.

    Args:
        path: of the file.
        version: of the runtime.
        integer_products: number of products that are integer kernels; ``None`` if the runtime does not tell.
        float_products: names of the other products.
    """

    runtime: ClassVar[str]

    def __init__(
        self, path: Path, version: str = "", integer_products: int | None = None, float_products: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.path, self.version = path, version
        self.integer_products, self.float_products = integer_products, list(float_products)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 ``[B, K]`` of float32 images ``[B, C, H, W]``."""


def as_tensor(array: object) -> Tensor:
    """A tensor of its own with the numbers of an array."""
    return torch.tensor(array, device="cpu")
