"""The tables of the page on export: accuracy, speed and size of integer files, from the rows of two benchmarks."""

import json
from pathlib import Path
from typing import Any

from spread import spread

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MODELS = {"vit_fmnist": "the bundled ViT", "swin_fmnist": "the bundled Swin", "model_112": "a real ViT-S, 112 pixels"}
VARIANTS = {
    "float32": "float32",
    "w8a8": "W8A8",
    "w4a8": "W4A8",
    "quantize_static": "`quantize_static`, defaults",
    "quantize_static_products": "`quantize_static`, products only",
    "float32_openvino": "float32 in OpenVINO",
    "w8a8_openvino": "W8A8 in OpenVINO",
    "w4a8_openvino": "W4A8 in OpenVINO",
}


def integers_block() -> str:
    """Accuracy of the files, then their speed and size."""
    return f"### Accuracy\n\n{_accuracy()}\n\n### Speed and size\n\n{_speed()}"


def _accuracy() -> str:
    lines = (RESULTS / "integers.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    runtimes = list(dict.fromkeys(each["runtime"] for row in rows for each in row["measured"]))
    table = [
        f"| model | recipe | full precision | simulated | {' | '.join(runtimes)} | agreement | integer products |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(runtimes)} ---: | ---: |",
    ]
    groups = dict.fromkeys((row["model"], row["backend"]) for row in rows)
    for model, backend in sorted(groups, key=lambda group: list(MODELS).index(group[0])):
        group = [row for row in rows if (row["model"], row["backend"]) == (model, backend)]
        cells = [MODELS[model], f"`backends/{backend}`", f"{group[0]['fp']:.2f}", _spread(group, "simulated")]
        cells += [_spread([_of(row, runtime) for row in group], "top1") for runtime in runtimes]
        first = [_of(row, runtimes[0]) for row in group]
        cells += [_spread(first, "agreement"), f"{first[0]['integer_products']} of {first[0]['products']}"]
        table.append("| " + " | ".join(cells) + " |")
    versions = {f"{each['runtime']} {each['version']}" for row in rows for each in row["measured"]}
    machines = {row["machine"]["device"] for row in rows}
    note = (
        f"Top-1 in percent, measured in {' and '.join(sorted(versions))}: seeds 0 to 2, mean ± standard deviation "
        "(seed 0 where there is none), 32 images of `images/spdfq_plus`, 2,000 test images (500 for the real ViT). "
        f"Agreement with the simulation and integer products are those of {runtimes[0]}. Machine: "
        f"{', '.join(sorted(machines))}, one thread. Reproduce: `python benchmarks/integers.py`. "
        "Rows: `benchmarks/results/integers.jsonl`."
    )
    return "\n".join([*table, "", note])


def _of(row: dict[str, Any], runtime: str) -> dict[str, Any]:
    (found,) = [each for each in row["measured"] if each["runtime"] == runtime]
    return dict(found)


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    return spread([row[key] for row in rows])


def _speed() -> str:
    found = json.loads((RESULTS / "deploy.json").read_text("utf-8"))
    parts = []
    for model, data in found["models"].items():
        batches = list(data["batches"])
        table = [
            f"| {model} | {' | '.join(f'batch {batch}' for batch in batches)} | MB | times smaller |",
            f"| --- |{' ---: |' * len(batches)} ---: | ---: |",
        ]
        for variant, label in VARIANTS.items():
            if variant in data["batches"][batches[0]]:
                file = variant.removesuffix("_openvino")
                ratios = [f"{data['batches'][batch][variant]['speedup']:.2f}" for batch in batches]
                sizes = [f"{data['megabytes'][file]:.2f}", f"{data['smaller'][file]:.2f}"]
                table.append("| " + " | ".join([label, *ratios, *sizes]) + " |")
        parts.append("\n".join(table))
    note = (
        "Times faster than float32 in onnxruntime, on one thread: median over the rounds of the ratio of CPU seconds. "
        f"The weights of the ViT-S are random. Machine: {found['device']}, load {found['load_before']} before; "
        f"onnxruntime {found['onnxruntime']}. Reproduce: `python benchmarks/deploy.py`. Data: "
        "`benchmarks/results/deploy.json`."
    )
    return "\n\n".join([*parts, note])
