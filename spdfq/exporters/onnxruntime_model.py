"""An ONNX file in onnxruntime, and which of its products are integer kernels."""

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from spdfq.errors import ModelError, first_line
from spdfq.exporters.products import whole_products
from spdfq.exporters.runtime_models import RuntimeModel, as_tensor
from spdfq.extras import require
from spdfq.inference.session import cpu_session

INTEGER_KERNELS = frozenset(
    {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulInteger", "ConvInteger"}
)
"""Operators of onnxruntime's optimised graph that multiply integers."""
FLOAT_KERNELS = frozenset(
    {
        *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"),
        *("Einsum", "Attention", "MultiHeadAttention", "MatMulNBits", "DynamicQuantizeMatMul"),
    }
)
"""Operators that multiply in float, or quantize their input in their own way."""


class OnnxRuntimeModel(RuntimeModel):
    """An ONNX file in onnxruntime on the CPU, with all optimisations and torch's number of threads.

    Args:
        path: of the file.

    Raises:
        ModelError: onnxruntime cannot read the file.
        SpdfqError: onnxruntime is not installed.
    """

    runtime: ClassVar[str] = "onnxruntime"

    def __init__(self, path: Path) -> None:
        require("onnxruntime", ("onnx", "onnxruntime"), "onnx")
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            optimised, threads = Path(folder) / "optimised.onnx", torch.get_num_threads()
            try:
                session = cpu_session(str(path), intra_op_num_threads=threads, optimized_model_filepath=str(optimised))
            except Exception as error:  # onnxruntime has an exception type for each reason
                raise ModelError(f"{path}: onnxruntime cannot read it ({first_line(error)}); export it again") from None
            nodes = onnx.load(str(optimised), load_external_data=False).graph.node
        integer = whole_products(node.name for node in nodes if node.op_type in INTEGER_KERNELS)
        floating = whole_products(node.name.partition("/")[0] for node in nodes if node.op_type in FLOAT_KERNELS)
        super().__init__(path, onnxruntime.__version__, len(integer), floating)
        self._session: Any = session

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images; see `RuntimeModel.forward`."""
        return as_tensor(self._session.run(None, {self._session.get_inputs()[0].name: images.numpy()})[0])
