"""The page on the open constants of SPDFQ: the tables of the screening and of what was confirmed, from the rows."""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from result_rows import RESULTS, groups_by, iterations_of, machines, rows_of
from spread import spread

from spdfq.bench.groups import difference
from spdfq.bench.rows import Row

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import spdfq_study as study

SCREENING = "spdfq_study_vit_fmnist"
BEDS = {
    "spdfq_study_confirm_vit_fmnist": "The bundled ViT, W3A3",
    "spdfq_study_confirm_real_vit_112": "A real ViT-S at 112 pixels, W4A4",
    "spdfq_study_confirm_clipart_vit_112": "The same encoder on clip art, W4A4",
}
ABLATION = "fmnist_spdfq_ablation"
FULL_LENGTH = "real_vit_112_full_length"
# images, the parts that they have, and what the paper reports with these
PARTS = {
    "cross_entropy": ("none", 51.73),
    "apa": ("APA", 60.26),
    "msr": ("MSR", 50.75),
    "sl": ("SL", 52.02),
    "apa_msr": ("APA, MSR", 61.58),
    "apa_sl": ("APA, SL", 60.51),
    "msr_sl": ("MSR, SL", 56.08),
    "spdfq": ("all: SPDFQ", 62.29),
}
NAMES = {
    "real_fmnist": "real images (reference)",
    "real_clipart": "real images (reference)",
    "predicted": "reading `predicted`",
    "clear": "reading `clear`",
    "outside": "reading `outside`",
    "present": "present recipe",
    "spdfq": "SPDFQ",
    "psaq_vit": "PSAQ-ViT",
    "mimiq": "MimiQ",
    "cross_entropy": "cross-entropy",
    "gaussian_noise": "Gaussian noise",
}


def study_block() -> str:
    """The effects, the readings chosen by them, and what new seeds gave."""
    rows = rows_of(SCREENING)
    found = study.main_effects(rows)
    beds = [_bed(name, title) for name, title in BEDS.items() if (RESULTS / f"{name}.jsonl").exists()]
    return "\n\n".join([_screening(rows, found), _readings(found["top1"]), *beds, _full_length(), _ablation()])


def _screening(rows: list[Row], found: dict[str, list[dict[str, Any]]]) -> str:
    cells = [row.top1 for each in study.rows_by_cell(rows).values() for row in each]
    others = {name: [row.top1 for row in rows if row.axes["images"] == name] for name in NAMES}
    beside = ", ".join(f"{_plain(name)} {values[0]:.1f}" for name, values in others.items() if values)
    table = ["| factor | from | to | top-1 | agreement |", "| --- | --- | --- | ---: | ---: |"]
    for on_top1, on_agreement in zip(found["top1"], found["agreement"], strict=True):
        factor, level = on_top1["factor"], on_top1["level"]
        outside = " (outside the paper)" if (factor, level) in study.OUTSIDE else ""
        cells_of = f"{_interval(on_top1)} | {_interval(on_agreement)}"
        table.append(f"| {factor} | {study.present()[factor]} | {level}{outside} | {cells_of} |")
    tested, full = rows[0].measured.images, rows[0].measured.fp.top1
    return (
        "\n".join(table)
        + "\n\nMain effects in percentage points with 95 % intervals; bold where the interval excludes zero. "
        f"{len(cells)} of the {study.CELLS} cells are finished, each with {study.IMAGES} images, {study.ITERATIONS} "
        f"iterations (published: 32 and 1,000) and one seed. {tested} test images, full precision {full:.1f} %. The "
        f"cells have {min(cells):.1f} to {max(cells):.1f} %, mean {mean(cells):.1f}; beside them: {beside}. "
        f"Machine: {machines(rows)}. Reproduce: `spdfq bench benchmarks/spdfq_study/screen_vit_fmnist.toml`. "
        f"Rows: `benchmarks/results/{SCREENING}.jsonl`."
    )


def _readings(found: list[dict[str, Any]]) -> str:
    lines = []
    for name, levels in study.best(found).items():
        changed = [f"{factor}: {level}" for factor, level in levels.items() if level != study.present()[factor]]
        lines.append(f"* `{name}`: {'; '.join(changed) or 'the present recipe'}.")
    return "\n".join(lines)


def _bed(file: str, title: str) -> str:
    rows = [row for row in rows_of(file) if not row.error]
    groups = groups_by(rows, lambda row: str(row.axes["images"]).partition(" + ")[0])
    table = ["| images | top-1 | over the present recipe | agreement |", "| --- | ---: | ---: | ---: |"]
    for name in (each for each in NAMES if each in groups):
        own = list(groups[name].rows.values())
        over = "" if name == "present" else str(difference(groups[name], groups["present"]))
        cells = [NAMES[name], f"{spread([row.top1 for row in own], 1)} ({len(own)})", over]
        table.append(f"| {' | '.join(cells)} | {spread([row.measured.agreement or 0.0 for row in own], 1)} |")
    bed = file.removeprefix("spdfq_study_confirm_")
    measured = rows[0].measured
    return (
        f"## {title}\n\n"
        + "\n".join(table)
        + "\n\nTop-1 in percent, simulated, mean ± standard deviation over the seeds (how many); differences with 95 % "
        "intervals over seeds and test images; "
        f"{study.IMAGES} images, {study.BEDS[bed].iterations} iterations. Full precision {measured.fp.top1:.1f} %, "
        f"{measured.images} test images that played no part in the choice. Machine: {machines(rows)}. Reproduce: "
        f"`spdfq bench benchmarks/spdfq_study/confirm_{bed}.toml`."
    )


def _full_length() -> str:
    """Sources at their published lengths on the real ViT."""
    rows = [row for row in rows_of(FULL_LENGTH) if not row.error]
    groups = groups_by(rows, lambda row: f"{row.axes['images']} {row.axes['backend']}")
    backends = list(dict.fromkeys(str(row.axes["backend"]) for row in rows))
    headings = [text for name in backends for text in (f"`{name}`", "over PSAQ-ViT")]
    table = [f"| images | iterations | {' | '.join(headings)} |", "| --- |" + " ---: |" * (1 + len(headings))]
    for images, name in NAMES.items():
        if not any(row.axes["images"] == images for row in rows):
            continue
        optimised = images not in ("real_fmnist", "gaussian_noise")
        cells = [f"{iterations_of(f'images/{images}'):,}" if optimised else ""]
        for backend in backends:
            group, psaq = groups.get(f"{images} {backend}"), groups.get(f"psaq_vit {backend}")
            cells.append(spread([row.top1 for row in group.rows.values()], 1) if group else "")
            cells.append(str(difference(group, psaq)) if group and psaq and group is not psaq else "")
        table.append(f"| {name} | {' | '.join(cells)} |")
    measured, seeds = rows[0].measured, sorted({row.seed for row in rows})
    return (
        "## Published lengths, the real ViT-S at 112 pixels, W4A4\n\n"
        + "\n".join(table)
        + "\n\nTop-1 in percent, simulated, and differences with 95 % intervals; 32 images; seeds: "
        f"{', '.join(map(str, seeds))}. Full precision {measured.fp.top1:.1f} %, "
        f"{measured.images:,} test images. Machine: {machines(rows)}. Reproduce: `spdfq bench "
        f"benchmarks/real_vit/full_length.toml`. Rows: `benchmarks/results/{FULL_LENGTH}.jsonl`."
    )


def _ablation() -> str:
    """SPDFQ's parts alone and together, beside the paper's numbers."""
    rows = rows_of(ABLATION)
    groups = groups_by(rows, lambda row: str(row.axes["images"]))
    none, full = groups["cross_entropy"], rows[0].measured
    table = ["| parts | top-1 | over none | the paper's DeiT-S, W4A4 |", "| --- | ---: | ---: | ---: |"]
    for images, (parts, paper) in PARTS.items():
        own = groups[images]
        over = "" if own is none else str(difference(own, none))
        shown = spread([row.top1 for row in own.rows.values()], 1)
        table.append(f"| {parts} | {shown} | {over} | {paper:.2f} |")
    return (
        "## The paper's ablation, the bundled ViT at W3A3\n\n"
        + "\n".join(table)
        + "\n\nNone: cross-entropy and total variation, which every row has. Top-1 in percent, simulated, under "
        f"`ridge`, {len(none.rows)} seeds, 32 images, 200 iterations, crops every second one; differences with 95 % "
        f"intervals over seeds and test images. Full precision {full.fp.top1:.1f} %, {full.images} test images. "
        f"Machine: {machines(rows)}. Reproduce: `spdfq bench benchmarks/fmnist/spdfq_ablation.toml`."
    )


def _interval(of: dict[str, Any]) -> str:
    text = f"{of['effect']:+.1f} [{of['low']:.1f}, {of['high']:.1f}]"
    return f"**{text}**" if of["low"] > 0 or of["high"] < 0 else text


def _plain(name: str) -> str:
    return NAMES[name].replace("`", "").replace(" (reference)", "")
