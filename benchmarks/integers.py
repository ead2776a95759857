"""Quantize for integer runtimes, export, and measure the files in onnxruntime and OpenVINO.

    python benchmarks/integers.py --model models/vit_fmnist --out benchmarks/results/integers.jsonl
    python benchmarks/integers.py --model benchmarks/real_vit/model_112.toml --out benchmarks/results/integers.jsonl

Each line of the result is one file: model, recipe of the back-end, seed, the accuracy of the float model and of the
simulation, and what each runtime measured. A finished line is not measured again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import about

import spdfq
from spdfq.runs.exporting import export_run

IMAGES = "images/spdfq_plus"
BACKENDS = ("backends/w8a8", "backends/w4a8", "backends/w8a16")


def measured(model: str, backend: str, seed: int, folder: Path) -> dict[str, Any]:
    recipe = spdfq.load_recipe({"extends": [model, IMAGES, backend]}, seed=seed)
    out = folder / f"{Path(model).stem}-{Path(backend).name}-{seed}"
    metrics = spdfq.run(recipe, out=out, device="cpu").metrics
    entry = export_run(out, check=True)
    return {
        "model": Path(model).stem,
        "backend": Path(backend).name,
        "images": IMAGES,
        "seed": seed,
        "test_images": metrics["images"],
        "fp": metrics["fp"]["top1"],
        "simulated": metrics["quantized"]["top1"],
        "size": entry["size"],
        "measured": entry["measured"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="recipe of the model and its test images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    finished = {(row["model"], row["backend"], row["seed"]) for row in done}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for backend in BACKENDS:
                if (Path(options.model).stem, Path(backend).name, seed) in finished:
                    continue
                row = {**measured(options.model, backend, seed, Path(folder)), "machine": about()}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
