"""Measure which families can be exported, and write the columns on it into the table of docs/models.md.

It needs the extra onnx, open_clip_torch and transformers. Each family is kept in docs/export-matrix.json as soon
as it is measured, so a call that was stopped continues.

python tools/export_matrix.py                # all families that are not in the file
python tools/export_matrix.py --only swin    # only matching families, again
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family
from support_matrix import COLUMNS, DOCS, EXPORTS, RECIPE, RUNTIME, replaced, teacher_of

from spdfq.backends import quantize
from spdfq.errors import SpdfqError
from spdfq.exporters.export import exporter_named, write_export
from spdfq.exporters.onnxruntime_model import OnnxRuntimeModel
from spdfq.exporters.products import quantized_products
from spdfq.recipe import load_recipe

IMAGES, BATCH = 32, 4
_W8A8 = [
    "quantization.steps=[{type='calibrate', observer='minmax', weight_observer='minmax'}]",
    "quantization.overrides=[]",
    "quantization.weights.bits=8",
    "quantization.activations.bits=8",
    "quantization.softmax={type='uniform', bits=8}",
]


def measure(family: Family) -> dict[str, Any]:
    """The cells of one family, W8A8 with uniform quantizers everywhere."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        found |= _measured(family)
    except Exception as error:  # every kind of failure belongs in the table
        kind = "" if isinstance(error, SpdfqError) else f"{type(error).__name__}: "
        found |= {COLUMNS[0]: "**no**", "why": kind + str(error).strip().splitlines()[0][:300]}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


@torch.no_grad()
def _measured(family: Family) -> dict[str, Any]:
    teacher = teacher_of(family)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *teacher.input_size, generator=generator).clamp(-1, 1)
    spec = load_recipe({"extends": [*RECIPE["extends"], "images/gaussian_noise"]}, _W8A8).quantization
    model = quantize(teacher, images[:2], spec, RUNTIME)
    with tempfile.TemporaryDirectory() as folder:
        done = write_export(model, teacher, Path(folder) / "model.onnx", exporter_named("onnx"))
        file = OnnxRuntimeModel(done.path)
        products = quantized_products(model, teacher) - len(done.constant_products)
        pairs = [(file(batch).argmax(1), model(batch).argmax(1)) for batch in images.split(BATCH)]
    same = sum(int((one == other).sum()) for one, other in pairs)
    floating = list(dict.fromkeys(file.float_products))[:6]
    cells = ("yes", f"{file.integer_products} of {products}", f"{100 * same / IMAGES:.0f} %")
    return dict(zip(COLUMNS, cells, strict=True)) | {"float_products": floating}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose name or member contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    known = json.loads(EXPORTS.read_text(encoding="utf-8")) if EXPORTS.is_file() else {}
    wanted = [f for f in FAMILIES if arguments.only.lower() in f"{f.name} {f.member}".lower()]
    wanted = [f for f in wanted if arguments.only or f.member not in known]
    with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(measure, family): family for family in wanted}
        for done in as_completed(waiting):
            family = waiting[done]
            known[family.member] = done.result()
            order = [f.member for f in FAMILIES if f.member in known]
            EXPORTS.write_text(json.dumps({name: known[name] for name in order}, indent=1) + "\n", encoding="utf-8")
            print(f"{family.name}: {known[family.member]}", flush=True)
    sys.path.insert(0, str(DOCS))
    from generate import block, refresh

    page = DOCS / "models.md"
    refresh(page, "matrix", replaced(block(page.read_text(encoding="utf-8"), "matrix"), []))


if __name__ == "__main__":
    main()
