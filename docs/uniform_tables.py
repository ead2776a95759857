"""The tables of the page on the uniform back-end, from the rows of its benchmarks."""

import json
import re
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from result_rows import RESULTS, groups_by, machines, rows_of
from spread import spread

from spdfq.bench.groups import Group, difference
from spdfq.bench.intervals import difference_over_seeds
from spdfq.bench.rows import Row

IMAGES = {
    "real_fmnist": "real training images",
    "spdfq_plus": "`spdfq_plus`",
    "spdfq_spectral": "SPDFQ in natural coordinates",
    "plus_msr": "SPDFQ in natural coordinates",
    "spdfq": "SPDFQ",
    "psaq_vit": "PSAQ-ViT",
    "mimiq": "MimiQ",
    "cross_entropy": "cross-entropy",
    "gaussian_noise": "Gaussian noise",
}
BACKENDS = {
    "strong": "`strong`, W4A4",
    "plus": "`plus`, W4A4",
    "ridge": "`ridge`, W4A4",
    "repq": "`repq`, W4A4",
    "strong_w3a3": "`strong`, W3A3",
    "plus_w3a3": "`plus`, W3A3",
    "strong_w4a8": "`strong`, W4A8",
    "strong_w4a8_penalty_100": "`strong`, W4A8, penalty 100",
    "w4a8": "`w4a8`",
    "strong_w2a4": "`strong`, W2A4",
}
RIDGE = "real_vit_112_repq_ridge"
TABLES = [
    (
        "A real ViT-S at 112 pixels",
        [
            "real_vit_112_strong",
            "real_vit_112_strong_w4a8",
            "real_vit_112_plus_report",
            "real_vit_112_strong_sources",
            RIDGE,
        ],
    ),
    ("The bundled ViT", ["fmnist_vit_strong", "fmnist_vit_strong_others"]),
]
# what was to be reached, the least top-1, and the rows that show whether it was
GOALS = [
    ("real ViT, W4A4, real images", 79.0, "real_vit_112_strong", "real_fmnist", "strong"),
    ("real ViT, W4A4, `spdfq_plus`", 75.0, "real_vit_112_strong", "spdfq_plus", "strong"),
    ("real ViT, W3A3, real images", 62.0, "real_vit_112_strong", "real_fmnist", "strong_w3a3"),
    ("real ViT, W3A3, `spdfq_plus`", 52.0, "real_vit_112_strong", "spdfq_plus", "strong_w3a3"),
    ("real ViT, W4A8, `spdfq_plus`", 82.5, "real_vit_112_strong_w4a8", "spdfq_plus", "strong_w4a8_penalty_100"),
    ("bundled ViT, W3A3, `spdfq_plus`", 89.5, "fmnist_vit_strong", "spdfq_plus", "strong_w3a3"),
    ("bundled ViT, W2A4, `spdfq_plus`", 82.0, "fmnist_vit_strong_others", "spdfq_plus", "strong_w2a4"),
]
SOURCES = ("real_fmnist", "spdfq_plus")
ABLATION = "fmnist_vit_strong_ablation"
# a part of `strong` on the real ViT, and the back-end without it
REAL_ABLATION = "real_vit_112_strong_ablation"
PARTS = {
    "`rotate`": "strong_no_rotation",
    "`smooth`": "strong_no_smoothing",
    "`ridge`": "strong_no_ridge",
    "asymmetric weights": "strong_symmetric",
}
# what is added to the name of the back-end `strong_w3a3`, and what it says
LEARNING = {"global_local": "`global_local`", "guard": "`global_local` with `guard`"}
COUNTS = "synthesis.images"
MANY = "real_vit_112_strong_256"
SYMMETRY = {True: "symmetric", False: "asymmetric"}
COMPARED, BASELINE = ("spdfq_plus", "spdfq", "cross_entropy", "mimiq", "gaussian_noise"), "psaq_vit"
DOCTOR, LISTED = "real_vit_112_doctor", 10
# a model, its files, and the back-ends that correct the head and that do not
HEAD = [
    (
        "real ViT, W4A4",
        ("real_vit_112_strong_head", "real_vit_112_strong", "real_vit_112_strong_sources"),
        "strong_head",
        "strong",
    ),
    (
        "real ViT, W3A3",
        ("real_vit_112_strong_head", "real_vit_112_strong"),
        "strong_head_w3a3",
        "strong_w3a3",
    ),
    ("bundled ViT, W3A3", ("fmnist_vit_strong_head",), "strong_head_w3a3", "strong_w3a3"),
]
COMMANDS = {
    "real_vit_112_strong": "`spdfq bench benchmarks/real_vit/strong.toml`",
    "real_vit_112_strong_w4a8": "`spdfq bench benchmarks/real_vit/strong_w4a8.toml`",
    "real_vit_112_plus_report": "`spdfq bench benchmarks/real_vit/plus_report.toml`",
    "real_vit_112_strong_sources": "`spdfq bench benchmarks/real_vit/strong_sources.toml`",
    RIDGE: "`spdfq bench benchmarks/real_vit/repq_ridge.toml`",
    "fmnist_vit_strong": "`spdfq bench benchmarks/fmnist/vit_strong.toml`",
    "fmnist_vit_strong_others": "`spdfq bench benchmarks/fmnist/vit_strong_others.toml`",
}


def uniform_block() -> str:
    """Every table, each under its heading."""
    tables = [f"## {title}\n\n{_table(files)}\n\n{_over(files)}" for title, files in TABLES]
    return "\n\n".join(
        [
            f"## Goals\n\n{_goals()}",
            *tables,
            f"## Where the error is\n\n{_where()}",
            f"## Whether the head is corrected\n\n{_head()}",
            f"## What each part gives\n\n{_ablation()}\n\n{_real_ablation()}\n\n{_many()}",
            f"## What was tried\n\n{_tries()}",
        ]
    )


def _goals() -> str:
    """Each goal with what was measured."""
    lines = ["| goal | at least | measured |", "| --- | ---: | ---: |"]
    for goal, least, name, images, backend in GOALS:
        axes = {"images": images, "backend": backend}
        lines.append(f"| {goal} | {least} | {_cell([row for row in rows_of(name) if row.axes == axes])} |")
    return "\n".join(
        [*lines, "", "These were set before the back-end was built. Top-1 in percent, from the tables below."]
    )


def _table(files: list[str]) -> str:
    """Images in rows and back-ends in columns; and how the numbers were made."""
    rows = rows_of(*files)
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.axes["images"], row.axes["backend"]), []).append(row)
    images = [key for key in IMAGES if any(key == cell[0] for cell in cells)]
    backends = [key for key in BACKENDS if any(key == cell[1] for cell in cells)]
    lines = ["| " + " | ".join(["images", *(BACKENDS[key] for key in backends)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(backends))
    for key in images:
        found = [cells.get((key, backend)) for backend in backends]
        lines.append("| " + " | ".join([IMAGES[key], *map(_cell, found)]) + " |")
    return "\n".join([*lines, "", _caption(rows, files)])


def _over(files: list[str]) -> str:
    """The differences of sources to one of them under each back-end, paired over seeds and test images."""
    groups = groups_by(rows_of(*files), lambda row: f"{row.axes['images']} {row.axes['backend']}")
    backends = [key for key in BACKENDS if f"{BASELINE} {key}" in groups]
    table = [
        "| " + " | ".join([f"over {IMAGES[BASELINE]}", *(BACKENDS[key] for key in backends)]) + " |",
        "| --- |" + " ---: |" * len(backends),
    ]
    for images in COMPARED:
        pairs = [(groups.get(f"{images} {key}"), groups[f"{BASELINE} {key}"]) for key in backends]
        shown = [str(difference(*pair)) if pair[0] and _machines(*pair) == 1 else "" for pair in pairs]
        table.append("| " + " | ".join([IMAGES[images], *shown]) + " |")
    note = "Differences of top-1 on one machine, with a 95 % interval over seeds and, unless marked, over test images."
    return "\n".join([*table, "", note])


def _machines(*groups: Group) -> int:
    """The number of machines of some groups."""
    return len({row.device_name for group in groups for row in group.rows.values()})


def _cell(rows: list[Row] | None) -> str:
    """Top-1 of the seeds: mean and standard deviation."""
    if not rows:
        return ""
    return spread([row.top1 for row in rows], 1)


def _caption(rows: list[Row], files: list[str]) -> str:
    seeds, (test,) = sorted({row.seed for row in rows}), {row.measured.images for row in rows}
    (full,) = {row.measured.fp.top1 for row in rows}
    (placement,) = {row.backend.placement for row in rows}
    kept = f"seeds {seeds[0]} to {seeds[-1]}, mean ± standard deviation"
    commands = ", ".join(COMMANDS[name] for name in files)
    sources = ", ".join(f"`benchmarks/results/{name}.jsonl`" for name in files)
    note = "`ridge` has AdaLog's quantizer after GELU, `repq` a uniform one. " if RIDGE in files else ""
    return (
        f"Top-1 in percent, simulated. {note}Full precision {full:.1f} %, {test:,} test images, {kept}, 32 calibration "
        f"images, placement `{placement}`, first and last layer 8 bits. Machine: {machines(rows)}. "
        f"Reproduce: {commands}. Rows: {sources}."
    )


def _where() -> str:
    """What each kind of site costs by itself, and how much of the correction holds on other images."""
    found = json.loads((RESULTS / f"{DOCTOR}.json").read_text("utf-8"))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for site in found["sites"]:
        kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", site["site"]), []).append(site)
    cost = {kind: sum(site["alone"] for site in sites) for kind, sites in kinds.items()}
    table = ["| sites | how many | cost of each alone, summed | median SNR, dB |", "| --- | ---: | ---: | ---: |"]
    for kind in sorted(cost, key=lambda kind: -cost[kind])[:LISTED]:
        sites = kinds[kind]
        table.append(f"| `{kind}` | {len(sites)} | {cost[kind]:.3f} | {median(site['snr'] for site in sites):.1f} |")
    blocks = [
        "| block | before `ridge` | after | other images, before | after |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for block in found["blocks"][::2] + found["blocks"][-1:]:
        cells = [f"{block[key]:.3f}" for key in ("before", "after", "heldout_before", "heldout_after")]
        blocks.append(f"| `{block['block']}` | {' | '.join(cells)} |")
    note = (
        f"Cost: KL divergence from the teacher's predictions if only this site is quantized, on {found['images']} "
        f"calibration images. All sites together: {found['kl']:.3f} there and {found['heldout_kl']:.3f} on "
        f"{found['heldout']} other images (top-1 {found['full_top1']:.1f} % to {found['top1']:.1f} %). Second table: "
        "error of a block's output, relative to its size. The real ViT at W4A4 with real images, `strong` when it "
        f"still corrected the head. Machine: {found['device_name']}, {found['precision']}. Reproduce: `spdfq doctor "
        f"RUN`. Data: `benchmarks/results/{DOCTOR}.json`."
    )
    return "\n\n".join(["\n".join(table), "\n".join(blocks), note])


def _head() -> str:
    """Top-1 with and without a regression for the head, paired over seeds and test images."""
    table = ["| model | images | head corrected | not corrected | difference |", "| --- | --- | ---: | ---: | ---: |"]
    compared: list[Row] = []
    for model, files, corrected, left in HEAD:
        rows = rows_of(*files)
        groups = groups_by(rows, lambda row: f"{row.axes['images']} {row.axes['backend']}")
        for images, name in IMAGES.items():
            before, after = groups.get(f"{images} {corrected}"), groups.get(f"{images} {left}")
            if before and after:
                shown = [_cell(list(group.rows.values())) for group in (before, after)]
                table.append(f"| {model} | {name} | {' | '.join(shown)} | {difference(after, before)} |")
                compared += [*before.rows.values(), *after.rows.values()]
    files = ", ".join(
        f"`benchmarks/results/{name}.jsonl`"
        for name in dict.fromkeys(name for _, names, _, _ in HEAD for name in names)
    )
    return "\n".join(table) + (
        f"\n\nTop-1 in percent, simulated, with a 95 % interval over seeds and 1,000 test images. Machine: "
        f"{machines(compared)}. Reproduce: `spdfq bench benchmarks/fmnist/vit_strong_head.toml`, `spdfq bench "
        f"benchmarks/real_vit/strong_head.toml`. Rows: {files}."
    )


def _ablation() -> str:
    """Combinations of the parts, and the effect of each part over all others."""
    rows = rows_of(ABLATION)
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(_setting(row), []).append(row)
    counts = sorted({count for *_, count in cells})
    columns = [(source, count) for source in SOURCES for count in counts]
    headings = [f"{IMAGES[source]}, {count}" for source, count in columns]
    table = [
        "| " + " | ".join(["rotation", "learns before `ridge`", "weights", *headings, "seconds"]) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(columns) + 1),
    ]
    for rotation, learning, symmetric in dict.fromkeys(cell[:3] for cell in cells):
        found = [cells.get((rotation, learning, symmetric, *column)) for column in columns]
        seconds = median(row.stages["quantize"]["seconds"] for row in found[0] or [] if row.stages)
        named = "with" if rotation else "without", LEARNING.get(learning, "nothing"), SYMMETRY[symmetric]
        table.append("| " + " | ".join([*named, *map(_cell, found), f"{seconds:.0f}"]) + " |")
    effects = ["| part | " + " | ".join(IMAGES[source] for source in SOURCES) + " |", "| --- | ---: | ---: |"]
    parts: dict[str, tuple[int, Any, Any]] = {  # the place in a setting, and the values without and with the part
        "rotation": (0, False, True),
        "`global_local`": (1, "", "global_local"),
        "its `guard`": (1, "global_local", "guard"),
        "asymmetric weights": (2, True, False),
        f"{counts[-1]} images instead of {counts[0]}": (4, counts[0], counts[-1]),
    }
    for part, change in parts.items():
        effects.append(f"| {part} | " + " | ".join(_effect(cells, source, change) for source in SOURCES) + " |")
    note = (
        f"Top-1 in percent, simulated, of the bundled ViT at W3A3: full precision {rows[0].measured.fp.top1:.1f} %, "
        f"{rows[0].measured.images:,} test images, seeds 0 to {max(row.seed for row in rows)}. Seconds are those of "
        f"the back-end with {counts[0]} real images. Second table: the mean difference over all settings that have "
        f"both values, with a 95 % interval. Machine: {machines(rows)}. Reproduce: `spdfq bench "
        f"benchmarks/fmnist/strong_ablation.toml`. Rows: `benchmarks/results/{ABLATION}.jsonl`."
    )
    return "\n\n".join(["\n".join(table), "\n".join(effects), note])


def _real_ablation() -> str:
    """`strong` on the real ViT without each of its parts, and with training."""
    rows = rows_of(REAL_ABLATION)
    groups = groups_by([*rows_of(*TABLES[0][1]), *rows], lambda row: f"{row.axes['images']} {row.axes['backend']}")
    headings = [text for source in SOURCES for text in (IMAGES[source], "what the part gives")]
    table = ["| real ViT, W4A4 | " + " | ".join(headings) + " |", "| --- |" + " ---: |" * len(headings)]
    changes = [("`strong`", "strong", 0), *((f"without {part}", backend, 1) for part, backend in PARTS.items())]
    for change, backend, sign in [*changes, ("with `global_local` before `ridge`", "strong_global_local", -1)]:
        cells = []
        for source in SOURCES:
            whole, other = groups[f"{source} strong"], groups.get(f"{source} {backend}")
            cells.append(_cell(list(other.rows.values()) if other else None))
            pair = (whole, other) if sign > 0 else (other, whole)
            cells.append(str(difference(*pair)) if other and sign else "")
        table.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(table) + (
        f"\n\nTop-1 in percent, simulated, {rows[0].measured.images:,} test images, seeds 0 to "
        f"{max(row.seed for row in rows)} (`global_local`: seed 0), with 95 % intervals over seeds and "
        f"test images. Machine: {machines(rows)}. "
        "Reproduce: `spdfq bench benchmarks/real_vit/strong_ablation.toml`. Rows: "
        f"`benchmarks/results/{REAL_ABLATION}.jsonl`."
    )


def _many() -> str:
    """More images of `spdfq_plus` on the real ViT, in one sentence."""
    rows = rows_of(MANY)
    groups = groups_by(rows, lambda row: str(row.axes[COUNTS]))
    few, many = sorted(groups, key=int)
    tops = [_cell(list(groups[count].rows.values())) for count in (few, many)]
    return (
        f"{many} images of `spdfq_plus` on the real ViT at W4A4 give {tops[1]} with `strong`, {few} give {tops[0]}: "
        f"{difference(groups[many], groups[few])}. Both are in bfloat16, on the same test images and seeds 0 to "
        f"{max(row.seed for row in rows)}. Machine: {machines(rows)}. Reproduce: `spdfq bench "
        f"benchmarks/real_vit/strong_256.toml`. Rows: `benchmarks/results/{MANY}.jsonl`."
    )


def _setting(row: Row) -> tuple[Any, ...]:
    """Rotation, what learns, symmetric weights, images and their number of a row of the ablation."""
    backend = row.axes["backend"].removeprefix("strong_w3a3")
    learning = next((name for name in LEARNING if backend.endswith(name)), "")
    return "no_rotation" not in backend, learning, "symmetric" in backend, row.axes["images"], row.axes[COUNTS]


def _effect(cells: dict[tuple[Any, ...], list[Row]], source: str, change: tuple[int, Any, Any]) -> str:
    """The mean difference between two values of one part of the settings."""
    place, without, value = change
    own: dict[int, list[float]] = {}
    other: dict[int, list[float]] = {}
    for setting, rows in cells.items():
        before = cells.get((*setting[:place], without, *setting[place + 1 :]))
        if setting[3] == source and setting[place] == value and before:
            for tops, side in ((own, rows), (other, before)):
                for row in side:
                    tops.setdefault(row.seed, []).append(row.top1)
    return str(difference_over_seeds(*([mean(tops[seed]) for seed in sorted(tops)] for tops in (own, other))))


def _tries() -> str:
    """What was tried on the images on which settings are chosen, on both models."""
    real = (
        "Top-1 in percent, simulated, of the real ViT at W4A4 (or as said): seed 0, the 500 images on which settings "
        "are chosen, one run each, so a difference below 2 points can be chance. Some of these runs used drafts of the "
        "steps."
    )
    bundled = (
        "KL divergence from the teacher's predictions, and top-1 in percent, simulated, of the bundled ViT at W3A3 (or "
        "as said): means of seeds 0 and 1 (one seed where marked *), the 500 images on which settings are chosen. The "
        "divergence of two draws of images differs by 0.02."
    )
    return "\n\n".join(
        [
            _tries_of("real_vit_112_strong_tries", real, lambda rows: f"{mean(row.top1 for row in rows):.1f}"),
            _tries_of("fmnist_vit_strong_tries", bundled, _divergence),
        ]
    )


def _divergence(rows: list[Row]) -> str:
    one = "" if len(rows) > 1 else "*"
    return f"{mean(row.measured.divergence or 0.0 for row in rows):.3f}, {mean(row.top1 for row in rows):.1f}{one}"


def _tries_of(name: str, note: str, shown: Callable[[list[Row]], str]) -> str:
    rows = rows_of(name)
    table = ["| change | real images | `spdfq_plus` |", "| --- | ---: | ---: |"]
    for idea in dict.fromkeys(row.axes["idea"] for row in rows):
        cells = [
            [row for row in rows if (row.axes["idea"], row.axes["images"]) == (idea, images)] for images in SOURCES
        ]
        table.append(f"| {idea} | " + " | ".join(shown(found) if found else "" for found in cells) + " |")
    return "\n".join([*table, "", f"{note} Rows: `benchmarks/results/{name}.jsonl`."])
