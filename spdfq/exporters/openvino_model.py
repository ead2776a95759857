"""An ONNX file in OpenVINO, and which of its products are integer kernels."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from spdfq.errors import ModelError, first_line
from spdfq.exporters.products import whole_products
from spdfq.exporters.runtime_models import RuntimeModel, as_tensor
from spdfq.extras import require

_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
_INTEGERS = ("i8", "u8")


class OpenVinoModel(RuntimeModel):
    """An ONNX file in OpenVINO on the CPU, in float32 where it is not quantized.

    OpenVINO would take bfloat16 instead of float32 on processors that are fast at it. Products that it has merged into
    a subgraph, such as those of attention, are neither in ``integer_products`` nor in ``float_products``.

    Args:
        path: of the file.

    Raises:
        ModelError: OpenVINO cannot read the file.
        SpdfqError: OpenVINO is not installed.
    """

    runtime: ClassVar[str] = "OpenVINO"

    def __init__(self, path: Path) -> None:
        require("OpenVINO", ("openvino",), "openvino")
        import openvino

        core = openvino.Core()
        try:
            compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except Exception as error:  # OpenVINO has one exception type for everything
            raise ModelError(f"{path}: OpenVINO cannot read it ({first_line(error)}); export it again") from None
        sizes = compiled.input(0).get_partial_shape()
        one = [size.get_length() if size.is_static else 1 for size in sizes]
        compiled(np.zeros(one, np.float32))  # the kernels are chosen for the first image
        products = [op for op in compiled.get_runtime_model().get_ordered_ops() if _text(op, "layerType") in _PRODUCTS]
        integer, floating = (
            whole_products(_name(op) for op in products if _is_integer(op) is wanted) for wanted in (True, False)
        )
        super().__init__(path, openvino.__version__.partition("-")[0], len(integer), floating)
        self._compiled: Any = compiled

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images; see `RuntimeModel.forward`."""
        return as_tensor(self._compiled(images.numpy())[0])


def _name(op: Any) -> str:
    return str(op.get_friendly_name()).partition("/")[0].removesuffix("_bias")


def _is_integer(op: Any) -> bool:
    """Whether both operands of a product are integers; an integer weight alone is converted to float first."""
    return all(op.input(index).get_element_type().to_string() in _INTEGERS for index in (0, 1))


def _text(op: Any, key: str) -> str:
    return str(op.get_rt_info()[key].astype(str))
