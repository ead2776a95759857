"""How often a simulation agrees with itself if only the last digits of its numbers change.

    spdfq run my.toml --out runs/vit_w8a8
    spdfq export runs/vit_w8a8
    python benchmarks/self_agreement.py runs/vit_w8a8 --out benchmarks/results/self_agreement.json

An activation in the middle of two codes is rounded up or down by its last digits. One such code changes the inputs of
the next layers, and more codes change there. So a file cannot be expected to agree with the simulation in float32 more
often than the same simulation in float64 does (its quantizers still compute in float32). Other runs that are in --out
are kept. The table of the docs takes the model (vit, swin, real) and the back-end from the name of the run's folder.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from machine import about

from spdfq.evaluation.accuracy import agreement
from spdfq.exporters.onnxruntime_model import OnnxRuntimeModel
from spdfq.quantized.checkpoint import load_checkpoint
from spdfq.registry import datasets
from spdfq.runs.finished import finished_recipe


@torch.no_grad()
def compared(folder: Path, count: int) -> dict[str, Any]:
    """Agreement with the simulation in float32 in percent, and the mean absolute difference of the logits."""
    model, teacher, _ = load_checkpoint(folder / "quantized")
    dataset = finished_recipe(folder).to_dict()["evaluation"]["dataset"]
    options = {**dataset, "limit": count}
    batches = [batch.images for batch in datasets.get(options.pop("type"))(**options).batches(teacher, 50)]
    double, file = copy.deepcopy(model).double(), OnnxRuntimeModel(folder / "model.onnx")
    ways = {
        "float64": lambda images: double(images.double()).float(),
        "onnxruntime": file,
    }
    simulated = torch.cat([model(images) for images in batches])
    found: dict[str, Any] = {"images": len(simulated), "spread_of_logits": round(float(simulated.std()), 4)}
    for name, way in ways.items():
        logits = torch.cat([way(images) for images in batches])
        found[name] = {
            "agreement": round(agreement(logits, simulated), 2),
            "difference": round(float((logits - simulated).abs().mean()), 6),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs with model.onnx")
    parser.add_argument("--images", type=int, default=500, help="test images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    if options.out and options.out.is_file():
        rows = json.loads(options.out.read_text("utf-8"))["runs"]
    machine = about()
    for folder in options.runs:
        rows[folder.name] = {"machine": machine, **compared(folder, options.images)}
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"runs": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
