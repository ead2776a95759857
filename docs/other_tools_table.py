"""The table of the page on other tools, from the rows of its benchmark."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from spread import spread

FILES = ("benchmarks/results/other_tools.json", "benchmarks/results/other_tools_real_vit.json")
ROOT = Path(__file__).parents[1]
MODELS = {
    "bundled:vit_fmnist": "The bundled ViT",
    "bundled:swin_fmnist": "The bundled Swin",
    "vit_small_patch14_dinov2": "A real ViT-S at 112 pixels",
}
SOURCES = {
    ("gaussian_noise", "float32"): "Gaussian noise",
    ("spdfq_plus", "float32"): "`spdfq_plus`",
    ("spdfq_plus", "8-bit pictures"): "`spdfq_plus`, as 8-bit pictures",
    ("real", "float32"): "real training images",
}
WAYS = {
    ("onnxruntime", "MinMax"): "onnxruntime, MinMax",
    ("onnxruntime", "Entropy"): "Entropy",
    ("onnxruntime", "Percentile"): "Percentile",
    ("nncf", "default"): "NNCF",
}


def other_tools_block() -> str:
    """A table of top-1 for each model, and how the numbers were made."""
    found = {file: json.loads((ROOT / file).read_text(encoding="utf-8")) for file in FILES}
    rows = [row for each in found.values() for row in each["rows"]]
    tables = [_table(title, [row for row in rows if row["model"] == name]) for name, title in MODELS.items()]
    return "\n\n".join([*tables, _caption(rows, {file: each["machine"] for file, each in found.items()})])


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"| calibrated on | {' | '.join(WAYS.values())} |", f"| --- |{' ---: |' * len(WAYS)}"]
    for source, label in SOURCES.items():
        cells = [[row for row in rows if _source(row) == source and _way(row) == way] for way in WAYS]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(map(_cell, cells))} |")
    (full,), (images,) = {row["fp"] for row in rows}, {row["images"] for row in rows}
    return "\n".join([f"### {title}", "", f"Full precision {full:.2f} %, {images:,} test images.", "", *lines])


def _source(row: dict[str, Any]) -> tuple[str, str]:
    return row["source"], row["as"]


def _way(row: dict[str, Any]) -> tuple[str, str]:
    return row["tool"], row["calibrator"]


def _cell(rows: list[dict[str, Any]]) -> str:
    """Top-1 with its spread over the seeds, and the mean agreement with full precision."""
    if not rows:
        return ""
    top1, same = [row["top1"] for row in rows], mean(row["agreement"] for row in rows)
    return f"{spread(top1)} ({same:.1f})"


def _caption(rows: list[dict[str, Any]], machines: dict[str, dict[str, Any]]) -> str:
    tools = {name: number for row in rows for name, number in row["tools"].items()}
    seeds = sorted({row["seed"] for row in rows})
    (count,) = {row["calibration_images"] for row in rows}
    named = ", ".join(f"{name} {tools[name]}" for name in sorted(tools))
    made = "; ".join(f"{each['device']}, {each['threads']} thread (`{file}`)" for file, each in machines.items())
    return (
        f"Top-1 in percent, **measured in onnxruntime {tools['onnxruntime']}** on the CPU: mean ± standard deviation "
        f"over seeds {seeds[0]} to {seeds[-1]}, in parentheses the agreement with full precision. "
        f"W8A8, {count} calibration images, weights per output channel, otherwise the defaults of each tool ({named}). "
        f"Rows and machines: {made}. Reproduce: `python benchmarks/other_tools.py --tools onnxruntime nncf`, and for "
        "the real ViT the options that its docstring names."
    )
