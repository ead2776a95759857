"""The table of the page on other tools, from the rows of its benchmark."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from spread import spread

FILE = "benchmarks/results/other_tools.json"
ROOT = Path(__file__).parents[1]
MODELS = {"bundled:vit_fmnist": "The bundled ViT", "bundled:swin_fmnist": "The bundled Swin"}
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
    found = json.loads((ROOT / FILE).read_text(encoding="utf-8"))
    named = {row["model"]: MODELS.get(row["model"], f"`{row['model']}`") for row in found["rows"]}
    order = [*(name for name in MODELS if name in named), *(name for name in named if name not in MODELS)]
    tables = [_table(named[name], [row for row in found["rows"] if row["model"] == name]) for name in order]
    return "\n\n".join([*tables, _caption(found)])


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


def _caption(found: dict[str, Any]) -> str:
    rows, machine = found["rows"], found["machine"]
    tools = {name: number for row in rows for name, number in row["tools"].items()}
    seeds = {model: sorted({row["seed"] for row in rows if row["model"] == model}) for model in MODELS}
    counted = "; ".join(f"{model}: seeds {', '.join(map(str, each))}" for model, each in seeds.items() if each)
    (count,) = {row["calibration_images"] for row in rows}
    named = ", ".join(f"{name} {tools[name]}" for name in sorted(tools))
    machine = f"{machine['device']}, {machine['threads']} thread"
    return (
        f"Top-1 in percent, **measured in onnxruntime {tools['onnxruntime']}** on the CPU: mean ± standard deviation "
        f"over the seeds (one seed where there is none), in parentheses the agreement with full precision. "
        f"W8A8, {count} calibration images, weights per output channel, otherwise the defaults of each tool ({named}). "
        f"{counted}. Machine: {machine}. Reproduce: `python benchmarks/other_tools.py --tools onnxruntime nncf`. "
        f"Rows: `{FILE}`."
    )
