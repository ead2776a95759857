"""Logarithmic quantizers in a file: their tables are stored, and are not computed for each batch of images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spdfq.quantizers.log_grid import LogTables
from spdfq.quantizers.logarithmic import LogarithmicQuantizer

LookUp = Callable[[LogTables, Tensor], Tensor]
"""``look_up(tables, x)`` gives float32 values of ``x``."""


@torch.library.custom_op("spdfq::look_up", mutates_args=())
def _look_up(
    x: Tensor,
    scale: Tensor,
    edges: Tensor,
    values: Tensor,
    minus_step: Tensor,
    shift: Tensor | None,
    top: Tensor | None,
) -> Tensor:
    return LogTables(scale, edges, values, minus_step, shift, top).at(x)


@_look_up.register_fake
def _(x: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def look_up(tables: LogTables, x: Tensor) -> Tensor:
    """The values of float32 ``x``, as one operator."""
    values: Tensor = _look_up(x, *tables)
    return values


class StoredLogarithm(nn.Module):
    """A frozen logarithmic quantizer whose tables are buffers. Its values are the same, bit for bit.

    Args:
        quantizer: frozen.
        look_up: as `look_up`; `LogTables.at` uses operators that every program can hold.
    """

    def __init__(self, quantizer: LogarithmicQuantizer, look_up: LookUp) -> None:
        super().__init__()
        for name, tensor in quantizer.tables()._asdict().items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        self._look_up, self._shift, self._shifted_back = look_up, quantizer.input_shift, quantizer.shifted_back

    def forward(self, x: Tensor) -> Tensor:
        """The dequantized ``x``, same shape and dtype."""
        tables: dict[str, Any] = {name: self._buffers[name] for name in LogTables._fields}
        shifted = x.float() + self._shift if self._shift else x.float()
        return self._shifted_back(self._look_up(LogTables(**tables), shifted)).to(x.dtype)
