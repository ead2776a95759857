"""Measure exported models in onnxruntime and OpenVINO against float32, on one thread.

    python benchmarks/deploy.py --out benchmarks/results/deploy.json

The variants take turns in one process, so that other work on the machine slows all of them. Times are CPU seconds of
the process; a ratio is the median over the rounds of float32's time divided by the variant's time in the same round.
Weights of the ViT-S are random, since speed and size do not depend on them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from float_onnx import INPUT, export_float
from machine import about
from onnxruntime.quantization import QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import spdfq
from spdfq.calibration_data import CalibrationImages
from spdfq.exporters.onnxruntime_model import OnnxRuntimeModel
from spdfq.exporters.products import quantized_products
from spdfq.recipe import ModelSpec
from spdfq.teacher import Teacher

IMAGES = 4  # for the ranges, which change neither speed nor size
MODELS = {
    "vit_small_patch16_224": (ModelSpec(name="vit_small_patch16_224", pretrained=False), (1, 32)),
    "bundled:vit_fmnist": (ModelSpec(name="bundled:vit_fmnist"), (1, 32)),
}
Call = Callable[[Tensor], object]


def own_tool(source: Path, path: Path, images: CalibrationImages, **options: Any) -> Path:
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(str(prepared), str(path), images.onnxruntime_reader(INPUT), quant_format=QuantFormat.QDQ, **options)
    return path


def in_openvino(path: Path) -> Call:
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(str(path)), "CPU", hints).create_infer_request()
    return lambda x: request.infer({0: x.numpy()}, share_inputs=True)


def files_of(teacher: Teacher, folder: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """The file of each variant, and the number of quantized products of ours."""
    images = torch.randn(IMAGES, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    files = {"float32": export_float(teacher, folder / "float32.onnx")}
    calibration = CalibrationImages(images=images, mean=teacher.mean, std=teacher.std)
    products = {}
    for name in ("w8a8", "w4a8"):
        model = spdfq.quantize(teacher, images, f"backends/{name}", device="cpu", progress=False)
        files[name] = spdfq.export(model, teacher, folder / f"{name}.onnx").path
        products[name] = quantized_products(model, teacher)
    only_products = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "extra_options": {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    }
    for name, options in {"quantize_static": {}, "quantize_static_products": only_products}.items():
        files[name] = own_tool(files["float32"], folder / f"{name}.onnx", calibration, **options)
    return files, products


def timed(calls: dict[str, Call], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    for call in calls.values():
        call(x)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call(x)
            seconds[name].append(time.process_time() - start)
    base = seconds["float32"]
    return {
        name: {
            "ms": round(1e3 * statistics.median(own), 3),
            "speedup": round(statistics.median(b / a for a, b in zip(own, base, strict=True)), 3),
        }
        for name, own in seconds.items()
    }


def measure(teacher: Teacher, batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        files, products = files_of(teacher, Path(name))
        sizes = {variant: path.stat().st_size for variant, path in files.items()}
        calls, kernels = dict[str, Call](), dict[str, int | None]()
        for variant, path in files.items():
            model = OnnxRuntimeModel(path)
            calls[variant], kernels[variant] = model, model.integer_products
        try:
            for variant in ("float32", "w8a8", "w4a8"):
                calls[f"{variant}_openvino"] = in_openvino(files[variant])
        except ImportError:
            print("openvino is not installed; it is left out")
        found = {}
        for batch in batches:
            x = torch.randn(batch, *teacher.input_size, generator=torch.Generator().manual_seed(0))
            found[str(batch)] = timed(calls, x, rounds if batch > 1 else 5 * rounds)
    return {
        "batches": found,
        "rounds": rounds,
        "megabytes": {variant: round(size / 1e6, 3) for variant, size in sizes.items()},
        "smaller": {variant: round(sizes["float32"] / size, 2) for variant, size in sizes.items()},
        "integer_kernels": kernels,
        "products": products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of batches of 32; batches of 1 have five times as many")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {**about(), "onnxruntime": onnxruntime.__version__, "models": {}}
    for name, (spec, batches) in MODELS.items():
        result["models"][name] = measure(spdfq.load_teacher(spec), batches, options.rounds)
        print(json.dumps({name: result["models"][name]}, indent=1), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
