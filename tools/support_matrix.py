"""Measure which models work, and write the table of docs/models.md. It needs open_clip_torch and transformers too.

python tools/support_matrix.py                # all families
python tools/support_matrix.py --only swin    # only the rows of matching families; the others stay unchanged
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from families import FAMILIES, Family
from torch import nn

from spdfq.attention import ATTENTION_OUTPUTS, CLASS_ATTENTION, record_attention
from spdfq.backends import Calibration, Rotate, quantize
from spdfq.errors import SpdfqError
from spdfq.quantized import QuantizedModel, place
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantized.visiting import find_sites
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime
from spdfq.synth.group import Group
from spdfq.synth.loop import step
from spdfq.teacher import Teacher

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "models.md"
CHECKS = ("sites", "float logits", "W8A8", "attention", "synthesis", "checkpoint", "rotate")
# measured by export_matrix.py
EXPORTS = DOCS / "export-matrix.json"
COLUMNS = ("exports", "integer products", "agreement")
RUNTIME = Runtime(seed=0)
RECIPE = {"extends": ["models/vit_fmnist", "backends/blockwise"]}
_MINMAX = "quantization.steps=[{type='calibrate', observer='minmax', weight_observer='minmax'}]"


@define
class Row:
    """The results of one family: a word or number for each check that passed, a reason for each that failed."""

    family: Family
    found: dict[str, str] = field(factory=dict)
    why: dict[str, str] = field(factory=dict)
    leftovers: list[str] = field(factory=list)
    notes: list[str] = field(factory=list)
    in_float: str = "**?**"
    seconds: float = 0.0

    def check(self, name: str, run: Callable[[], str]) -> None:
        try:
            self.found[name] = run()
        except Exception as error:  # every kind of failure belongs in the table
            kind = "" if isinstance(error, SpdfqError) else f"{type(error).__name__}: "
            self.why[name] = kind + str(error).strip().splitlines()[0][:300]


def teacher_of(family: Family, seed: int = 0) -> Teacher:
    """A member with random weights, all perturbed so that none is zero, and with batch norm statistics."""
    torch.manual_seed(seed)
    module = family.build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.01))
        size = (3, *family.size)
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = None
        if norms:
            module(torch.randn(4, *size))
        module.eval()
    return Teacher(
        module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=family.classes, input_size=size, name=family.member
    )


def measure(family: Family) -> Row:
    """Run every check in order. A check that needs an earlier one fails with it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row, start = Row(family), time.perf_counter()
    try:
        teacher = teacher_of(family)
        images = torch.randn(2, *teacher.input_size).clamp(-1, 1)
        _measure(row, teacher, images)
    except Exception as error:  # as above
        row.why["sites"] = f"cannot be built: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    row.seconds = time.perf_counter() - start
    return row


def _measure(row: Row, teacher: Teacher, images: torch.Tensor) -> None:
    made: dict[str, Any] = {}

    def sites() -> str:
        made["sites"], made["leftovers"] = find_sites(teacher.module, images[:1])
        row.leftovers = list(made["leftovers"])
        return str(len(made["sites"]))

    @torch.no_grad()
    def float_logits() -> str:
        plain = teacher.module(images)
        found = QuantizedModel(teacher.module, made["sites"], {}, made["leftovers"])(images)
        gap = float(((found - plain).abs() / plain.abs().clamp(min=1)).max())
        assert plain.std() > 1e-4, "the logits do not depend on anything"
        if gap > 1e-5:
            rounding = float((_in_float64(teacher.module, images) - plain).abs().max())
            raise AssertionError(f"logits differ by {gap:.1e} (float32 rounding of the network alone: {rounding:.1e})")
        return "yes"

    @torch.no_grad()
    def w8a8() -> str:
        given = {"extends": [*RECIPE["extends"], "images/gaussian_noise"]}
        spec = load_recipe(given, [_MINMAX, "quantization.overrides=[]", *_bits(8)]).quantization
        made["model"] = quantize(teacher, images, spec, RUNTIME)
        made["logits"] = made["model"](images)
        share = made["model"].float_share()
        row.in_float = f"{share.percent:.2f} %" if None not in share.unseen.values() else "**unknown**"
        assert made["logits"].isfinite().all(), "the quantized logits are not finite"
        return "yes"

    @torch.no_grad()
    def attention() -> str:
        with record_attention(teacher.module, {CLASS_ATTENTION, ATTENTION_OUTPUTS}) as record:
            teacher.module(images)
        assert all(row.isfinite().all() for row in record.class_attention), "the rows are not finite"
        made["recorded"] = True
        return str(len(record.names))

    def checkpoint() -> str:
        with tempfile.TemporaryDirectory() as folder:
            save_quantized(made["model"], folder, teacher)
            loaded = load_quantized(folder, teacher_of(row.family, seed=1).module)
            with torch.no_grad():
                assert torch.equal(loaded(images), made["logits"]), "the reloaded logits differ"
        return "yes"

    @torch.no_grad()
    def rotate() -> str:
        given = {"extends": [*RECIPE["extends"], "images/gaussian_noise"]}
        spec = load_recipe(given, ["quantization.overrides=[]"]).quantization
        done = {}
        for heads, stream in ((True, False), (False, True), (True, True)):
            model = place(teacher, spec)
            plain, before = model.network(images), copy.deepcopy(model.network.state_dict())
            step = Rotate(heads=heads, stream=stream)
            row.notes = []
            step.run(model, Calibration(teacher=teacher, images=images, runtime=RUNTIME))
            gap = float((model.network(images) - plain).abs().max() / plain.abs().max())
            after = model.network.state_dict()
            done[heads, stream] = any(
                not torch.equal(before[name], after[name]) for name in before.keys() & after.keys()
            )
            assert gap <= 1e-5, f"rotate: the logits change by {gap:.1e} of their maximum"
        row.notes = [note.removeprefix("rotate: ") for note in model.notes if note.startswith("rotate: ")]
        words = {(True, True): "both, partly" if row.notes else "full", (True, False): "heads only"}
        return {**words, (False, True): "stream only", (False, False): "**no**"}[done[True, False], done[False, True]]

    row.check("sites", sites)
    if "sites" in row.why:
        return
    row.check("float logits", float_logits)
    row.check("rotate", rotate)
    row.check("W8A8", w8a8)
    row.check("attention", attention)
    row.check("synthesis", lambda: _one_step(teacher, bool(made.get("recorded"))))
    if "W8A8" in row.found:
        row.check("checkpoint", checkpoint)


def _in_float64(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(module).double()(images.double()).float()


def _bits(number: int) -> list[str]:
    return [f"quantization.{what}.bits={number}" for what in ("weights", "activations", "softmax")]


def _one_step(teacher: Teacher, recorded: bool) -> str:
    """One step of the synthesis: with the attention prior if attention was recorded, otherwise with the label loss."""
    images = "images/spdfq" if recorded else "images/cross_entropy"
    small = [f"synthesis.{key}" for key in ("images=2", "group=2", "iterations=1", "sampler={type='whole_image'}")]
    spec = load_recipe({"extends": [*RECIPE["extends"], images]}, small).synthesis
    with teacher.frozen():
        group = Group(spec, teacher, RUNTIME, 0, 2)
        step([group], 0)
    curve = group.state.curve[0]
    assert curve.isfinite().all(), "a loss or the gradient is not finite"
    assert float(curve[-1]) > 0, "the gradient is zero"
    return "with prior" if recorded else "labels only"


def table(rows: list[Row]) -> str:
    """The Markdown table, one row per family."""
    head = ("family", "member", *CHECKS, *COLUMNS, "multiplications in float", "float products", "why not")
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *map(line, rows)])


def line(row: Row) -> str:
    """The row of one family."""
    cells = [*(row.found.get(check, "**no**") for check in CHECKS), *_exported(row.family)[0]]
    notes = [re.sub(r" of .*: not rotated", ": not rotated", note) for note in row.notes]
    why = "; ".join(dict.fromkeys([*row.why.values(), *notes, *_exported(row.family)[1]]))
    return f"{_start(row.family)} {' | '.join(cells)} | {row.in_float} | {len(row.leftovers)} | {why} |"


def _exported(family: Family) -> tuple[list[str], list[str]]:
    """The cells of the columns on exports, and the reasons for what is missing."""
    known = json.loads(EXPORTS.read_text(encoding="utf-8")) if EXPORTS.is_file() else {}
    found = known.get(family.member, {})
    why = [f"export: {found['why']}"] if "why" in found else []
    if found.get("float_products"):
        why.append(f"export: in float: {', '.join(found['float_products'])}")
    return [found.get(column, "–" if found else "not measured") for column in COLUMNS], why


def _start(family: Family) -> str:
    return f"| {family.name} | `{family.member}` |"


def replaced(page: str, rows: list[Row]) -> str:
    """The page's table with the rows of these families replaced or added, and all cells on exports."""
    head, old, new = table([]), page.splitlines(), {_start(row.family): line(row) for row in rows}
    starts = {_start(family): family for family in FAMILIES}
    kept = {start: _renewed(text, starts[start], old[0]) for start in starts for text in old if text.startswith(start)}
    kept |= new
    return "\n".join([head, *(kept[start] for start in starts if start in kept)])


def _renewed(text: str, family: Family, head: str) -> str:
    """An old row with the cells on exports that are known now."""
    old = dict(zip(_cells(head), _cells(text), strict=True))
    cells, why = _exported(family)
    found = {**old, **dict(zip(COLUMNS, cells, strict=True))}
    reasons = [reason for reason in old["why not"].split("; ") if reason and not reason.startswith("export: ")]
    found["why not"] = "; ".join([*reasons, *why])
    return f"| {' | '.join(found[name] for name in _cells(table([]).splitlines()[0]))} |"


def _cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.strip().removeprefix("|").removesuffix("|").split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose name or member contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    wanted = [f for f in FAMILIES if arguments.only.lower() in f"{f.name} {f.member}".lower()]
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(measure, wanted):
            print(f"{row.seconds:5.1f} s  {row.family.name}: {row.found} {row.why} {row.leftovers[:4]}", flush=True)
            rows.append(row)
    print(f"{len(rows)} families in {time.perf_counter() - start:.0f} s, {arguments.jobs} processes of one thread")
    sys.path.insert(0, str(DOCS))
    from generate import block, refresh

    there = block(PAGE.read_text(encoding="utf-8"), "matrix")
    refresh(PAGE, "matrix", replaced(there, rows) if arguments.only else table(rows))


if __name__ == "__main__":
    main()
