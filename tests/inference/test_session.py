"""Sessions of onnxruntime compute what the file says."""

import numpy as np
import pytest

from spdfq.inference import session
from spdfq.inference.session import cpu_session

onnx = pytest.importorskip("onnx")
COUNT = 64


def product():
    """A file of one product of uint8 values ``[8, COUNT]`` with the largest int8 codes."""
    codes = onnx.numpy_helper.from_array(np.full((COUNT, 8), 127, np.int8), "codes")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["values", "codes"], ["sums"])],
        "product",
        [onnx.helper.make_tensor_value_info("values", onnx.TensorProto.UINT8, [8, COUNT])],
        [onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, [8, 8])],
        [codes],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def test_sums_of_the_largest_integers_are_exact_on_every_processor():
    """Without an option, they saturate at 16 bits on x86 processors without VNNI: here 1048544."""
    (sums,) = cpu_session(product()).run(None, {"values": np.full((8, COUNT), 255, np.uint8)})
    assert (sums == 255 * 127 * COUNT).all()


def test_a_file_without_exact_kernels_is_opened_with_a_warning(monkeypatch):
    opened = session._session

    def refusing(model, settings, exact_sums):
        if exact_sums:
            raise RuntimeError("Attempt to replace the existing tensor")
        return opened(model, settings, exact_sums)

    monkeypatch.setattr(session, "_session", refusing)
    with pytest.warns(UserWarning, match="large sums of integer products saturate"):
        assert cpu_session(product()).get_inputs()[0].name == "values"
