"""The tables of the page on export: accuracy, speed and size of integer files, from the rows of two benchmarks."""

import json
from collections.abc import Collection
from statistics import mean
from typing import Any

from result_rows import RESULTS, machines, rows_of
from spread import spread

from spdfq.bench.rows import Row

MODELS = {"vit_fmnist": "the bundled ViT", "swin_fmnist": "the bundled Swin", "model_112": "a real ViT-S, 112 pixels"}
# first part of a run's name in self_agreement.json
SELF = {"vit": "vit_fmnist", "swin": "swin_fmnist", "real": "model_112"}
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
# kinds of work, and the operators of onnxruntime that do it
WORK = {
    "products": ("MatMul", "FusedMatMul", "Gemm", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "Conv"),
    "GELU": ("BiasGelu", "Gelu"),
    "QuantizeLinear, DequantizeLinear": ("QuantizeLinear", "DequantizeLinear"),
    "sums": ("Add", "Sub"),
    "moves": ("Transpose", "Split", "Reshape", "Slice", "Squeeze", "Concat", "Flatten", "ReorderOutput", "Gather"),
    "softmax": ("Softmax", "QLinearSoftmax"),
    "norms": ("LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization"),
}


def integers_block() -> str:
    """Accuracy of the files, how the recipes were chosen, then their speed and size."""
    parts = {
        "Accuracy": "\n\n".join([_accuracy("integers"), _self_agreement()]),
        "Without VNNI": "\n\n".join([_accuracy("integers_no_vnni"), _speed("deploy_no_vnni")]),
        "How the recipes were chosen": _choices(),
        "Speed and size": "\n\n".join([_speed("deploy_amd_vnni"), _speed("deploy")]),
        "Where the time goes": _profile(),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def _accuracy(name: str) -> str:
    rows = rows_of(name)
    runtimes = list(dict.fromkeys(row.axes["runtime"] for row in rows if row.integer_file))
    table = [
        f"| model | recipe | full precision | simulated | {' | '.join(runtimes)} | agreement | integer products |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(runtimes)} ---: | ---: |",
    ]
    groups = dict.fromkeys((row.axes["model"], row.axes["backend"]) for row in rows)
    for model, backend in sorted(groups, key=lambda group: list(MODELS).index(group[0])):
        group = [row for row in rows if (row.axes["model"], row.axes["backend"]) == (model, backend)]
        cells = [MODELS[model], f"`backends/{backend}`", f"{group[0].measured.fp.top1:.2f}"]
        cells += [_top1(group, runtime) for runtime in ("simulation", *runtimes)]
        first = [row.integer_file for row in group if row.integer_file and row.integer_file.runtime == runtimes[0]]
        cells += [spread([each.agreement for each in first]), f"{first[0].integer_products} of {first[0].products}"]
        table.append("| " + " | ".join(cells) + " |")
    versions = {f"{row.integer_file.runtime} {row.integer_file.version}" for row in rows if row.integer_file}
    note = (
        f"Top-1 in percent, measured in {' and '.join(sorted(versions))}: seeds 0 to 2, mean ± standard deviation, "
        "32 images of `images/spdfq_plus`, 2,000 test images (500 for the real ViT). "
        f"Agreement with the simulation and integer products are those of {runtimes[0]}. Machine: {machines(rows)}. "
        f"Reproduce: `python benchmarks/integers.py`. Rows: `benchmarks/results/{name}.jsonl`."
    )
    return "\n".join([*table, "", note])


def _self_agreement() -> str:
    """How often the simulation agrees with itself in float64, and the file with it."""
    runs = json.loads((RESULTS / "self_agreement.json").read_text("utf-8"))["runs"]
    table = [
        "| model | recipe | simulation in float64 | file | difference of the logits: float64 | file | their spread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, run in runs.items():
        model, recipe = name.split("_")
        ways = [run["float64"], run["onnxruntime"]]
        cells = [MODELS[SELF[model]], f"`backends/{recipe}`"]
        cells += [f"{way['agreement']:.1f}" for way in ways] + [f"{way['difference']:.3f}" for way in ways]
        table.append("| " + " | ".join([*cells, f"{run['spread_of_logits']:.1f}"]) + " |")
    (images,) = {run["images"] for run in runs.values()}
    (machine,) = {f"{run['machine']['device']}, {run['machine']['threads']} thread" for run in runs.values()}
    note = (
        f"Agreement with the simulation in float32 in percent, {images} test images, seed 0; mean absolute difference "
        f"of the logits, and their standard deviation. Machine: {machine}. "
        "Images: `images/spdfq_plus`. Reproduce: `python benchmarks/self_agreement.py RUN...`. "
        "Data: `benchmarks/results/self_agreement.json`."
    )
    return "\n".join([*table, "", note])


def _choices() -> str:
    """What was tried for the recipes, on the real ViT."""
    rows = rows_of("integers_tries")
    table = ["| recipe | change | top-1 | divergence | seeds |", "| --- | --- | ---: | ---: | --- |"]
    for backend, idea in dict.fromkeys((row.axes["backend"], row.axes["idea"]) for row in rows):
        group = [row for row in rows if (row.axes["backend"], row.axes["idea"]) == (backend, idea)]
        cells = [f"`{backend}`", idea, spread([row.top1 for row in group], 1)]
        cells += [f"{mean(row.measured.divergence or 0.0 for row in group):.3f}"]
        table.append("| " + " | ".join([*cells, ", ".join(str(row.seed) for row in group)]) + " |")
    note = (
        "Top-1 in percent and KL divergence from full precision (84.80 %), simulated; real ViT, 500 test images, 32 "
        f"images of `spdfq_plus`. Machine: {machines(rows)}. Rows: `benchmarks/results/integers_tries.jsonl`."
    )
    return "\n".join([*table, "", note])


def _top1(rows: list[Row], runtime: str) -> str:
    return spread([row.top1 for row in rows if row.axes["runtime"] == runtime])


def _speed(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
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
        f"onnxruntime {found['onnxruntime']}. Reproduce: `python benchmarks/deploy.py "
        f"--rounds {data['rounds']}`. Data: "
        f"`benchmarks/results/{name}.json`."
    )
    return "\n\n".join([*parts, note])


def speed_sentence() -> str:
    """How fast and how small the files of a ViT-S are, for the README."""
    found = json.loads((RESULTS / "deploy_amd_vnni.json").read_text("utf-8"))
    data = found["models"]["vit_small_patch16_224"]
    times = {variant: f"{row['speedup']:.1f}" for variant, row in data["batches"]["32"].items()}
    smaller = {variant: f"{ratio:.1f}" for variant, ratio in data["smaller"].items()}
    return (
        f"A W8A8 file of a ViT-S/16 at 224 pixels is {smaller['w8a8']} times smaller than float32 and {times['w8a8']} "
        f"times as fast in onnxruntime (its own `quantize_static`: {times['quantize_static_products']}), "
        f"{times['w8a8_openvino']} in OpenVINO. With W4A8 it is {smaller['w4a8']} times smaller and {times['w4a8']} "
        f"times as fast. Batches of 32, one thread, {found['device']}, with VNNI; other processors are on "
        "[the page on export](docs/export.md#speed-and-size)."
    )


def _profile() -> str:
    """Milliseconds of each kind of work in onnxruntime."""
    found = json.loads((RESULTS / "onnx_profile.json").read_text("utf-8"))
    profiles = [(batch, variant, data) for batch, each in found["profiles"].items() for variant, data in each.items()]
    heads = [f"{variant.replace('w8a8', 'W8A8')}, batch {batch}" for batch, variant, _ in profiles]
    table = [f"| vit_small_patch16_224, ms | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(profiles)}"]
    known = {operator for operators in WORK.values() for operator in operators}
    for kind, operators in WORK.items():
        table.append(_row(kind, [_milliseconds(data, set(operators)) for _, _, data in profiles]))
    others = [_milliseconds(data, data["operators"].keys() - known) for _, _, data in profiles]
    table += [_row("others", others), _row("all", [data["ms"] for _, _, data in profiles])]
    kernels = " ".join(
        f"{name}: {', '.join(f'{kind} {ms:.2f}' for kind, ms in each.items())}."
        for name, each in found["kernels"].items()
    )
    note = (
        "The least time of each node over all runs, summed over the nodes. Single products of the same shapes, by the "
        f"types of their factors (u8: uint8, s8: int8), in ms: {kernels} Machine: {found['device']}, one thread. "
        "Reproduce: `python benchmarks/onnx_profile.py`. Data: `benchmarks/results/onnx_profile.json`."
    )
    return "\n".join([*table, "", note])


def _milliseconds(data: dict[str, Any], operators: Collection[str]) -> float:
    return sum(each["ms"] for kind, each in data["operators"].items() if kind in operators)


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |"
