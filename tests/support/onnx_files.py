"""A small ONNX file whose logits are easy to compute by hand: it tells grey images from red ones."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spdfq.inference.preprocessing import Preprocessing

NAMES = ["grey", "red"]
INPUT = {
    "size": [8, 8],
    "channels": 3,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
PREPROCESSING = Preprocessing(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in INPUT.items()}
)


def metadata(**changed):
    """The entries of an exported file; ``None`` leaves one out."""
    entries = {"class_names": NAMES, "num_classes": 2, **INPUT, "simulated": {"top1": 75.0, "images": 4}, **changed}
    return {key: json.dumps(value) for key, value in entries.items() if value is not None}


def write_file(path, **changed):
    """Logits ``[-r, r]`` of an image with the mean ``r`` in its first, normalised channel."""
    weight = np.zeros((3, 2), np.float32)
    weight[0] = -1, 1
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([2, 3]), "axes")]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "colours", [images], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, metadata(**changed))
    onnx.save(model, str(path))
    return path
