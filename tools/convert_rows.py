"""Convert result rows from before rows had a schema. Rows that have one stay as they are, so it can be run again.

    python tools/convert_rows.py benchmarks/results/*.jsonl

What an old row did not record is null afterwards. Three kinds of old rows are known: cells of a bench, integer files
(one line for several runtimes becomes one row for each, and one for the simulation), and trials of single ideas.
"""

import json
import sys
from pathlib import Path
from typing import Any

from spdfq.bench.rows import Row, checked_row, write_rows
from spdfq.errors import SpdfqError

# the model of each recipe that benchmarks/integers.py was called with, and of the files of trials
MODELS = {
    "vit_fmnist": "bundled:vit_fmnist",
    "swin_fmnist": "bundled:swin_fmnist",
    "model_112": "vit_small_patch14_dinov2",
    "fmnist_vit_strong_tries": "bundled:vit_fmnist",
    "real_vit_112_strong_tries": "vit_small_patch14_dinov2",
}


def converted(old: dict[str, Any], file: str) -> list[dict[str, Any]]:
    """The new rows of a line.

    Args:
        old: the line.
        file: its name without the suffix.

    Raises:
        SpdfqError: a line of an unknown kind.
    """
    if "schema" in old:
        return [old]
    if {"axes", "metrics"} <= old.keys():
        return [_of_bench(old)]
    if "measured" in old:
        return _of_integers(old)
    if "idea" in old and file in MODELS:
        return [_of_trial(old, file)]
    raise SpdfqError(f"a row with the fields {', '.join(old)} is of no known kind; remove it")


def _of_bench(old: dict[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in old.items() if key != "model"}
    return {**row, "model": {"name": old["model"]}}


def _of_integers(old: dict[str, Any]) -> list[dict[str, Any]]:
    machine = old["machine"]
    shared = {
        "seed": old["seed"],
        "model": {"name": MODELS[old["model"]]},
        "backend": {"label": old["backend"].upper()},
        "device": "cpu",
        "device_name": machine["device"],
        **{"threads": machine["threads"], "versions": machine["versions"], "git_commit": machine["commit"]},
    }
    axes = {"model": old["model"], "images": Path(old["images"]).name, "backend": old["backend"]}
    counted = {"images": old["test_images"], "fp": {"top1": old["fp"]}}
    simulated = {**counted, "quantized": {"top1": old["simulated"]}, "simulated": True}
    rows = [{**shared, "axes": {**axes, "runtime": "simulation"}, "metrics": simulated}]
    for found in old["measured"]:
        metrics = {**counted, "images": found["images"], "quantized": {"top1": found["top1"]}, "simulated": False}
        integers = {key: found[key] for key in ("runtime", "version", "agreement", "products", "integer_products")}
        integers |= {"size": old["size"], "float_products": found["float_products"]}
        rows.append(
            {**shared, "axes": {**axes, "runtime": found["runtime"]}, "metrics": metrics, "integer_file": integers}
        )
    return rows


def _of_trial(old: dict[str, Any], file: str) -> dict[str, Any]:
    metrics = {
        "images": old["test_images"],
        "fp": {"top1": old.get("fp")},
        "quantized": {"top1": old["top1"]},
        "divergence": old["divergence"],
        "simulated": True,
    }
    axes = {"idea": old["idea"], "images": old["images"]}
    return {"axes": axes, "seed": old["seed"], "model": {"name": MODELS[file]}, "metrics": metrics}


def main(paths: list[str]) -> None:
    """Convert files in place, and print what was done."""
    for path in map(Path, paths):
        rows: list[Row] = []
        old = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            data = json.loads(line)
            old += "schema" not in data
            try:
                rows += [checked_row(row, f"{path}, line {number}") for row in converted(data, path.stem)]
            except SpdfqError as error:
                sys.exit(f"error: {path}, line {number}: {error}")
        if old:
            write_rows(path, rows)
        print(f"{path}: {old} rows converted, {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
