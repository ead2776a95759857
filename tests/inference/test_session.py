"""Sessions of onnxruntime compute what the file says."""

import numpy as np
import pytest

from spdfq.inference.session import cpu_session

onnx = pytest.importorskip("onnx")
COUNT = 64


def test_sums_of_the_largest_integers_are_exact_on_every_processor():
    """Without an option, they saturate at 16 bits on x86 processors without VNNI: here 1048544."""
    codes = onnx.numpy_helper.from_array(np.full((COUNT, 8), 127, np.int8), "codes")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["values", "codes"], ["sums"])],
        "product",
        [onnx.helper.make_tensor_value_info("values", onnx.TensorProto.UINT8, [8, COUNT])],
        [onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, [8, 8])],
        [codes],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (sums,) = cpu_session(model.SerializeToString()).run(None, {"values": np.full((8, COUNT), 255, np.uint8)})
    assert (sums == 255 * 127 * COUNT).all()
