"""The table of the README, from the rows of the quickstart's benchmark."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "fmnist_quickstart.jsonl"
IMAGES = {
    "real_fmnist": "real training images",
    "spdfq_plus": "`spdfq_plus`, this library's own recipe",
    "spdfq_spectral": "**SPDFQ**, the quickstart",
    "psaq_vit": "PSAQ-ViT",
    "spdfq_start": "natural noise: SPDFQ's images after one iteration",
    "gaussian_noise": "Gaussian noise",
}


def readme_block() -> str:
    """One row for each source of images: top-1, agreement, and the share of the gap that it closes."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    found = {images: [row for row in rows if row["axes"]["images"] == images] for images in IMAGES}
    low, high = (_top1(found[images]) for images in ("gaussian_noise", "real_fmnist"))
    table = ["| images | top-1, W3A3 | agreement | gap closed |", "| --- | ---: | ---: | ---: |"]
    for images, name in IMAGES.items():
        top1, agreement = _top1(found[images]), mean(row["metrics"]["agreement"] for row in found[images])
        spread = stdev(row["metrics"]["quantized"]["top1"] for row in found[images])
        gap = "" if top1 in (low, high) else f"{100 * (top1 - low) / (high - low):.0f} %"
        table.append(f"| {name} | {top1:.2f} ± {spread:.2f} | {agreement:.2f} | {gap} |")
    return "\n".join([*table, "", _caption(rows)])


def _top1(rows: list[dict[str, Any]]) -> float:
    return mean(row["metrics"]["quantized"]["top1"] for row in rows)


def _caption(rows: list[dict[str, Any]]) -> str:
    (backend,) = {json.dumps(row["backend"]) for row in rows}
    (device,) = {f"{row['device_name']}, {row['precision']}" for row in rows}
    seeds, metrics = sorted({row["seed"] for row in rows}), rows[0]["metrics"]
    placement = json.loads(backend)["placement"]
    steps = ", ".join(f"`{step}`" for step in json.loads(backend)["steps"])
    return (
        f"Full precision {metrics['fp']['top1']:.2f} %. Mean ± standard deviation of seeds {seeds[0]} to {seeds[-1]}, "
        f"{metrics['images']:,} test images, simulated accuracy, back-end {steps}, placement `{placement}`, first and "
        f"last layer 8 bits, 32 calibration images. Machine: {device}. Reproduce: `spdfq bench "
        "benchmarks/fmnist/quickstart.toml`."
    )
