"""Sessions of onnxruntime compute what the file says."""

import numpy as np
import pytest

from spdfq.inference import session
from spdfq.inference.session import PRODUCT_FILE, cpu_session, sums_saturate

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


def test_the_file_that_is_tried_first_is_that_product():
    assert product() == PRODUCT_FILE


@pytest.mark.parametrize("saturate", [False, True])
def test_slower_exact_kernels_are_chosen_only_where_sums_saturate(monkeypatch, saturate):
    chosen = []
    monkeypatch.setattr(session, "sums_saturate", lambda: saturate)
    monkeypatch.setattr(session, "_session", lambda model, settings, exact_sums: chosen.append(exact_sums))
    cpu_session(product())
    assert chosen == [saturate]


def test_saturated_sums_are_found(monkeypatch):
    class Saturating:
        def run(self, names, inputs):
            return [np.full((8, 8), 1048544)]

    monkeypatch.setattr(session, "_session", lambda model, settings, exact_sums: Saturating())
    assert sums_saturate.__wrapped__()


def test_a_file_without_exact_kernels_is_opened_with_a_warning(monkeypatch):
    opened = session._session

    def refusing(model, settings, exact_sums):
        if exact_sums:
            raise RuntimeError("Attempt to replace the existing tensor")
        return opened(model, settings, exact_sums)

    monkeypatch.setattr(session, "sums_saturate", lambda: True)
    monkeypatch.setattr(session, "_session", refusing)
    with pytest.warns(UserWarning, match="large sums of integer products saturate"):
        assert cpu_session(product()).get_inputs()[0].name == "values"
