"""Quantize for integer runtimes, export, and measure the files in onnxruntime and OpenVINO.

    python benchmarks/integers.py --model models/vit_fmnist --out benchmarks/results/integers.jsonl
    python benchmarks/integers.py --model benchmarks/real_vit/model_112.toml --out benchmarks/results/integers.jsonl

Each line of the result is a row (docs/results-schema.md): one of the simulation, and one of each runtime. What is
finished is not measured again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import spdfq
from spdfq.bench.rows import Row, checked_row, read_rows, row_of_run, write_rows
from spdfq.runs.exporting import export_run

IMAGES = "images/spdfq_plus"
BACKENDS = ("backends/w8a8", "backends/w4a8", "backends/w8a16")


def measured(model: str, backend: str, seed: int, folder: Path) -> list[Row]:
    """One row of the simulation, and one of each runtime."""
    recipe = spdfq.load_recipe({"extends": [model, IMAGES, backend]}, seed=seed)
    out = folder / f"{Path(model).stem}-{Path(backend).name}-{seed}"
    metrics = spdfq.run(recipe, out=out, device="cpu").metrics
    entry = export_run(out, check=True)
    axes = {"model": Path(model).stem, "images": Path(IMAGES).name, "backend": Path(backend).name}
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    rows = [row_of_run(record, axes={**axes, "runtime": "simulation"})]
    for found in entry["measured"]:
        integers = {key: found[key] for key in ("runtime", "version", "agreement", "products", "integer_products")}
        own = {
            **{"images": found["images"], "fp": {"top1": metrics["fp"]["top1"]}},
            **{"quantized": {"top1": found["top1"]}, "simulated": False},
        }
        data = {
            **rows[0].to_dict(),
            "axes": {**axes, "runtime": found["runtime"]},
            "metrics": own,
            "integer_file": {**integers, "size": entry["size"], "float_products": found["float_products"]},
            **{"seconds": None, "stages": None, "peak_memory": None},
        }
        rows.append(checked_row(data, f"{axes['model']}, {found['runtime']}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="recipe of the model and its test images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = read_rows(options.out) if options.out.exists() else []
    finished = {(row.axes["model"], row.axes["backend"], row.seed) for row in rows}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for backend in BACKENDS:
                if (Path(options.model).stem, Path(backend).name, seed) in finished:
                    continue
                rows += (found := measured(options.model, backend, seed, Path(folder)))
                write_rows(options.out, rows)
                print(*(f"{row.axes}: top-1 {row.top1:.2f}" for row in found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
