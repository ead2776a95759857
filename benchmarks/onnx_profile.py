"""Where an exported model spends its time in onnxruntime, on one thread.

    python benchmarks/onnx_profile.py --out benchmarks/results/onnx_profile.json

onnxruntime times every node. A node counts with its least time of all runs, which other work on the machine disturbs
least; the nodes of one operator are added. ``kernels`` are products alone, of the shapes in a ViT-S/16.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from float_onnx import export_float
from machine import about
from onnx import TensorProto, helper, numpy_helper

import spdfq
from spdfq.recipe import ModelSpec

TYPES = {"fp32": TensorProto.FLOAT, "u8": TensorProto.UINT8, "s8": TensorProto.INT8}
NUMPY = {"fp32": np.float32, "u8": np.uint8, "s8": np.int8}
SHAPES = {
    "scores": ((1, 6, 197, 64), (1, 6, 64, 197)),
    "values": ((1, 6, 197, 197), (1, 6, 197, 64)),
    "fc1": ((197, 384), (384, 1536)),
    "fc2": ((197, 1536), (1536, 384)),
}


def options(**changed: Any) -> onnxruntime.SessionOptions:
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    for key, value in changed.items():
        setattr(chosen, key, value)
    return chosen


def profile(path: Path, batch: int, size: tuple[int, ...], runs: int) -> dict[str, Any]:
    """Milliseconds and number of nodes of each operator."""
    chosen = options(enable_profiling=True, profile_file_prefix=str(path.with_suffix("")))
    session = onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((batch, *size)).astype(np.float32)
    for _ in range(runs):
        session.run(None, {session.get_inputs()[0].name: images})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    least: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"]
            least[name] = min(least.get(name, event["dur"]), event["dur"])
            kinds[name] = event["args"]["op_name"]
    times: Counter[str] = Counter()
    for name, duration in least.items():
        times[kinds[name]] += duration
    nodes = Counter(kinds.values())
    operators = {kind: {"ms": round(ms / 1e3, 3), "nodes": nodes[kind]} for kind, ms in times.most_common()}
    return {"ms": round(sum(times.values()) / 1e3, 3), "operators": operators}


def kernel(left: str, right: str, shapes: tuple[tuple[int, ...], ...], runs: int) -> float:
    """Least milliseconds of one product; integers become float32 as in MatMulIntegerToFloat."""
    names, draw = ("a", "b"), np.random.default_rng(0)
    feeds = {
        name: draw.integers(0, 100, shape).astype(NUMPY[kind])
        for name, kind, shape in zip(names, (left, right), shapes, strict=True)
    }
    inputs = [
        helper.make_tensor_value_info(n, TYPES[k], s) for n, k, s in zip(names, (left, right), shapes, strict=True)
    ]
    constants = []
    if len(shapes[1]) == 2:  # a weight
        constants.append(numpy_helper.from_array(feeds.pop("b"), "b"))
        inputs.pop()
    if left == "fp32":
        node = helper.make_node("MatMul", names, ["y"])
    else:
        constants += [numpy_helper.from_array(np.float32(0.01), f"{name}_scale") for name in names]
        constants += [
            numpy_helper.from_array(NUMPY[kind](0), f"{name}_zero")
            for name, kind in zip(names, (left, right), strict=True)
        ]
        node = helper.make_node(
            "MatMulIntegerToFloat", [*names, "a_scale", "b_scale", "a_zero", "b_zero"], ["y"], domain="com.microsoft"
        )
    graph = helper.make_graph(
        [node], "product", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options(), providers=["CPUExecutionProvider"])
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * min(seconds), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=128, help="per file and batch size")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {**about(), "onnxruntime": onnxruntime.__version__, "images": chosen.images}
    pairs = (("fp32", "fp32"), ("u8", "s8"), ("u8", "u8"), ("s8", "s8"))
    result["kernels"] = {
        name: {
            "".join(dict.fromkeys(pair)) if pair[0] == "fp32" else "".join(pair): kernel(*pair, shapes, 200)
            for pair in pairs
        }
        for name, shapes in SHAPES.items()
    }
    print(json.dumps(result["kernels"], indent=1), flush=True)
    teacher = spdfq.load_teacher(ModelSpec(name="vit_small_patch16_224", pretrained=False))
    images = torch.randn(4, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = spdfq.quantize(teacher, images, "backends/w8a8", device="cpu", progress=False)
        files = {
            "float32": export_float(teacher, folder / "float32.onnx"),
            "w8a8": spdfq.export(model, teacher, folder / "w8a8.onnx").path,
        }
        result["profiles"] = {
            str(batch): {
                variant: profile(path, batch, teacher.input_size, max(3, chosen.images // batch))
                for variant, path in files.items()
            }
            for batch in chosen.batches
        }
    print(json.dumps(result["profiles"], indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
