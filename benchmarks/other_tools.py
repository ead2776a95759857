"""Calibrate other tools on noise, on synthetic and on real images, and measure their integer models in onnxruntime.

    python benchmarks/other_tools.py --tools onnxruntime nncf --out benchmarks/results/other_tools.json

The teacher is exported to ONNX in float. onnxruntime's `quantize_static` and NNCF's `quantize` make a W8A8 file of it
(QuantizeLinear and DequantizeLinear) from 32 images each. Top-1 is that of the file in onnxruntime on the CPU. Rows
that --out has are kept. For another model, give timm's name, its weights and its images. The real ViT of
`benchmarks/real_vit.py`, and a model with images of your own:

    python benchmarks/other_tools.py --tools onnxruntime nncf --model vit_small_patch14_dinov2 --num-classes 10 \\
        --img-size 112 --checkpoint runs/real_vit/real_vit_112.safetensors \\
        --dataset '{"type": "fashion_mnist", "limit": 500}' --out benchmarks/results/other_tools_real_vit.json
    python benchmarks/other_tools.py --model vit_small_patch16_224 --checkpoint weights.safetensors --dataset \\
        '{"type": "image_folder", "root": "val", "limit": 500}' --real '{"type": "image_folder", "root": "train"}'
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from attrs import define
from float_onnx import INPUT, export_float
from machine import about

import spdfq
from spdfq.calibration_data import CalibrationImages
from spdfq.exporters.onnxruntime_model import OnnxRuntimeModel
from spdfq.recipe import ModelSpec
from spdfq.registry import datasets

BUNDLED = ("bundled:vit_fmnist", "bundled:swin_fmnist")
COUNT = 32
CALIBRATORS = {"onnxruntime": ("MinMax", "Entropy", "Percentile"), "nncf": ("default",)}
SOURCES = ("gaussian_noise", "spdfq_plus", "real")
AS = ("float32", "8-bit pictures")


@define
class TestImages:
    """Batches of labelled images, and the classes that the teacher predicts for them."""

    batches: list[Any]
    labels: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: spdfq.Teacher, dataset: dict) -> "TestImages":
        options = dict(dataset)
        batches = list(datasets.get(options.pop("type"))(**options).batches(teacher, 250))
        predicted = torch.cat([teacher.module(batch.images).argmax(1) for batch in batches])
        return cls(batches, torch.cat([batch.labels for batch in batches]), predicted)

    def measure(self, file: Path) -> dict[str, Any]:
        """Top-1 of a file in onnxruntime, and how many of its products are integer kernels there."""
        model = OnnxRuntimeModel(file)
        classes = torch.cat([model(batch.images).argmax(1) for batch in self.batches])
        return {
            "top1": percent(classes == self.labels),
            "fp": percent(self.predicted == self.labels),
            "agreement": percent(classes == self.predicted),
            "images": len(self.labels),
            "integer_products": model.integer_products,
            "float_products": len(model.float_products),
        }


def percent(right: torch.Tensor) -> float:
    return round(100 * int(right.sum()) / len(right), 3)


def prepared(teacher: spdfq.Teacher, folder: Path) -> Path:
    """The teacher in float, prepared as onnxruntime asks for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported = export_float(teacher, folder / "exported.onnx")
    quant_pre_process(str(exported), str(folder / "float.onnx"), skip_symbolic_shape=True)
    return folder / "float.onnx"


def calibration_images(
    source: str, teacher: spdfq.Teacher, seed: int, real: dict, folder: Path
) -> dict[str, CalibrationImages]:
    """32 images of a source; those of spdfq_plus also as 8-bit pictures."""
    section: Any = {"type": "real", "images": COUNT, "dataset": real} if source == "real" else f"images/{source}"
    made = spdfq.synthesize(teacher, section, seed=seed, progress=False)
    found = {AS[0]: CalibrationImages(images=made, mean=teacher.mean, std=teacher.std)}
    if source == "spdfq_plus":
        found[AS[0]].save(folder / "pictures")
        found[AS[1]] = CalibrationImages.load(folder / "pictures")
    return found


def quantize(tool: str, calibrator: str, model: Path, images: CalibrationImages, out: Path) -> None:
    """A W8A8 file: activations uint8, weights int8 for each output channel; everything else by default."""
    if tool == "nncf":
        import nncf

        dataset = images.nncf_dataset(INPUT)
        onnx.save(nncf.quantize(onnx.load(str(model)), dataset, model_type=nncf.ModelType.TRANSFORMER), str(out))
        return
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            model,
            out,
            images.onnxruntime_reader(INPUT),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[calibrator],
        )


def rows_of(name: str, teacher: spdfq.Teacher, arguments: argparse.Namespace, have: list[dict[str, Any]]) -> Any:
    """The rows of a model that are not there yet, one by one."""
    known = {tuple(row[key] for key in ("source", "as", "seed", "tool", "calibrator")) for row in have}
    test = TestImages.of(teacher, arguments.dataset)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, file = prepared(teacher, folder), folder / "quantized.onnx"
        for seed, source in itertools.product(arguments.seeds, SOURCES):
            forms = AS if source == "spdfq_plus" else AS[:1]
            ways = [(tool, each) for tool in arguments.tools for each in CALIBRATORS[tool]]
            wanted = [(form, *way) for form in forms for way in ways if (source, form, seed, *way) not in known]
            images = calibration_images(source, teacher, seed, arguments.real, folder) if wanted else {}
            for form, tool, calibrator in wanted:
                start = time.monotonic()
                quantize(tool, calibrator, model, images[form], file)
                seconds = round(time.monotonic() - start, 1)
                yield {
                    "model": name,
                    "source": source,
                    "as": form,
                    "seed": seed,
                    "tool": tool,
                    "calibrator": calibrator,
                    "calibration_images": len(images[form]),
                    **test.measure(file),
                    "calibration_seconds": seconds,
                    "tools": {each: version(each) for each in dict.fromkeys(("onnxruntime", tool))},
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=["onnxruntime"], choices=CALIBRATORS)
    parser.add_argument("--model", action="append", help="bundled or timm's name; by default both bundled models")
    parser.add_argument("--checkpoint", help="local weights of the model")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--dataset", type=json.loads, default={"type": "fashion_mnist"}, help="JSON; to measure on")
    parser.add_argument("--real", type=json.loads, default={"type": "fashion_mnist", "split": "train"}, help="JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON here; rows that it has are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger().setLevel(logging.ERROR)
    machine, rows = about(), []
    if arguments.out and arguments.out.is_file():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
    print(json.dumps(machine))
    for name in arguments.model or BUNDLED:
        spec = ModelSpec(
            name=name,
            checkpoint=arguments.checkpoint,
            num_classes=arguments.num_classes,
            img_size=arguments.img_size,
        )
        have = [row for row in rows if row["model"] == name]
        for row in rows_of(name, spdfq.load_teacher(spec), arguments, have):
            rows.append({**row, "commit": machine["commit"]})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
