"""The tables of the page on time and memory, from the JSON files of the benchmarks."""

import json
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

from result_rows import groups_by, machines, rows_of
from spread import spread

from spdfq.bench.groups import difference
from spdfq.bench.rows import Row

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NAMES = {"vit_small_patch16_224": "ViT-S/16", "vit_base_patch16_224": "ViT-B/16"}
LEFT_OUT = {
    "spdfq_plus": "nothing",
    "plus_least_attended": "the least attended, before iterations 20, 40 and 60",
    "plus_most_attended": "the most attended, before iterations 20, 40 and 60",
    "plus_most_attended_early": "the most attended, before iterations 10, 20 and 30",
}
PRUNED_ACCURACY = (
    ("bundled ViT, W3A3", ("fmnist_vit_pruning",), ("strong_w3a3", "ridge")),
    (
        "real ViT, W4A4",
        ("real_vit_112_pruning", "real_vit_112_strong", "real_vit_112_repq_ridge"),
        ("strong", "ridge"),
    ),
)
PRUNED = {
    "SMI (Sparse Model Inversion): 30 % of the patches each time": "token_pruning.json",
    "`images/patch_rebirth`, but half of the patches each time": "token_pruning_half.json",
}
TOGETHER = ("groups_per_pass.json", "groups_per_pass_vit_small.json")
LOSSES = {"patch_similarity_entropy": "`patch_similarity_entropy`", "head_similarity": "`head_similarity`"}


def time_block() -> str:
    """One section for each benchmark, with the file of every row."""
    return "\n\n".join(
        [
            _iteration(),
            _closed_form(),
            _blockwise(),
            _losses(),
            _pruning(),
            _coarse(),
            _length(),
            _together(),
            _ranks(),
            _machines(),
        ]
    )


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _iteration() -> str:
    """One iteration of SPDFQ against the bare passes of its views."""
    found = _read("synthesis_overhead.json")
    median, machine = found["median_ms"], found["machine"]
    own = 100 * (1 - median["bare_explicit"] / median["full"])
    return (
        "## An iteration of SPDFQ\n\n"
        f"{found['images']} images of the bundled ViT and {found['crops']} crops, {machine['threads']} threads: "
        f"{median['full']:.0f} ms, median of {found['rounds']} rounds. A bare\nforward and backward pass of as many "
        f"views takes {median['bare_explicit']:.0f} ms with timm's explicit attention and "
        f"{median['bare_fused']:.0f} ms with its fused one.\nSo the passes of the model are the largest term, and "
        f"priors, crops, losses, augmentations and the optimiser together are\n{own:.0f} % of an iteration. "
        "Reproduce: `python benchmarks/synthesis_overhead.py`. Data: `benchmarks/results/synthesis_overhead.json`."
    )


def _closed_form() -> str:
    rows = []
    for name in ("backends.json", "backends_vit_base.json"):
        found = _read(name)
        taken = found["closed_form"]
        steps = [f"{taken['seconds'][step]:.0f}" for step in ("calibrate", "repq", "ridge")]
        total, peak = f"**{taken['total_seconds']:.0f}**", f"**{taken['peak_gib']:.1f}**"
        rows.append([NAMES[found["model"]], str(found["machine"]["threads"]), *steps, total, peak, f"`{name}`"])
    columns = ["model", "threads", "calibrate, s", "repq, s", "ridge, s", "total, s", "peak memory, GiB", "file"]
    return (
        "## The back-end `ridge`\n\n"
        "Each step once, with 32 images of 224×224 pixels and random weights, in float32. The peak memory is that of\n"
        "the whole process, with the model and the images.\n\n" + _table(columns, rows)
    )


def _blockwise() -> str:
    rows = []
    for name in ("backends.json", "backends_one_thread.json", "backends_bfloat16.json"):
        found = _read(name)
        taken, median = found["blockwise"], found["blockwise"]["median_ms"]
        whole = 12 * 100 * median["iteration"] / 60_000
        numbers = [f"{median['iteration']:.0f}", f"{median['bare']:.0f}", f"{taken['ratio']:.2f}", f"about {whole:.0f}"]
        threads = str(found["machine"]["threads"])
        rows.append([NAMES[found["model"]], taken["precision"], threads, *numbers, f"`{name}`"])
    columns = [
        "model",
        "precision",
        "threads",
        "iteration, ms",
        "bare, ms",
        "ratio",
        "12 × 100 iterations, min",
        "file",
    ]
    return (
        "## The back-end `blockwise`\n\n"
        "One iteration of the reconstruction of one block on 32 images, and a bare forward and backward pass of the\n"
        "same float block on the same tokens. The last column is computed: a ViT-S has 12 blocks, and the recipe has\n"
        "100 iterations for each. Calibration and the passes between the blocks come on top.\n\n"
        + _table(columns, rows)
    )


def _losses() -> str:
    found = _read("losses.json")
    rows = []
    for loss, name in LOSSES.items():
        memory, time = found[loss]["memory"], found[loss]["time"]
        own = max(memory["ours_mib"], 0)
        direct = f"{memory['direct_mib']:,.0f}" + (
            " (extrapolated)" if memory["direct_extrapolated_from_two_blocks"] else ""
        )
        rows.append([name, f"{own:.0f}", direct, f"{time['ours_s']:.1f}", f"{time['direct_s']:.1f}", "`losses.json`"])
    size, threads = found["size"], found["machine"]["threads"]
    columns = ["loss", "memory, MiB", "direct, MiB", "time, s", "direct, s", "file"]
    return (
        "## Two losses over pairs\n\n"
        f"At the size of a ViT-S with {size['tokens']} patches: {size['images']} images, {size['blocks']} blocks, "
        f"{size['heads']} heads of {size['head_dim']} features.\nForward and backward, on {threads} thread. "
        '"Direct" is the formula written down with full tensors. Memory is what\n'
        "comes on top of the gradients; 0 means that the peak was no higher than before.\n\n" + _table(columns, rows)
    )


def _pruning() -> str:
    rows = []
    for name, file in PRUNED.items():
        found = _read(file)
        machine = found["machine"]
        steps = zip(found["patches_left"], found["speed_up_of_an_iteration"], strict=True)
        times = ", ".join(f"{faster:.2f} ({left})" for left, faster in steps)
        counts = [str(found["images"]), machine["precision"], f"{machine['load_before']:.1f}"]
        rows.append([name, *counts, times, f"**{found['speed_up_of_a_run']:.1f}**", f"`{file}`"])
    *starts, whole = accumulate(found["iterations_spent"])
    columns = ["images", "how many", "precision", "load", "speed-up of an iteration (patches left)", "of a run", "file"]
    return (
        "## Token pruning\n\n"
        f"A ViT-S/16 of 224×224 pixels with {found['patches_left'][0]} patches, {whole:,} iterations, "
        f"{machine['threads']} thread; patches are left out before\niterations {', '.join(map(str, starts))}. The "
        "machine was busy, so only ratios are given.\n\n"
        + _table(columns, rows)
        + "\n\nReproduce: `python benchmarks/token_pruning.py`, with the options that it names."
        + f"\n\n{_pruned_accuracy()}"
    )


def _pruned_accuracy() -> str:
    shown: list[Row] = []
    tables = []
    for name, files, backends in PRUNED_ACCURACY:
        groups = groups_by(rows_of(*files), lambda row: f"{row.axes['images']} {row.axes['backend']}")
        lines = []
        for images, what in LEFT_OUT.items():
            if f"{images} {backends[0]}" not in groups:
                continue
            rows = [list(groups[f"{images} {backend}"].rows.values()) for backend in backends]
            lines.append([what, *(spread([row.top1 for row in own], 1) for own in rows)])
            shown += [row for own in rows for row in own]
        tables.append(_table([f"left out, {name}", *(f"`{backend}`" for backend in backends)], lines))
    return (
        "What it costs: `spdfq_plus` with 100 iterations, half of the remaining patches left out each time. Top-1,\n"
        "simulated, seeds 0 to 2, 1,000 test images. Leaving out the most attended patches and finishing their\n"
        "pixels is the idea of Patch Rebirth Inversion (`images/patch_rebirth`). No recipe leaves out patches by "
        "default.\n\n"
        + "\n\n".join(tables)
        + f"\n\nMachine: {machines(shown)}. Reproduce: `spdfq bench benchmarks/fmnist/pruning.toml`, `spdfq bench "
        "benchmarks/real_vit/pruning.toml`."
    )


def _coarse() -> str:
    """What a first part at a smaller size saves, and costs."""
    found = _read("coarse_to_fine.json")
    variants = dict.fromkeys((row["coarse"], row["fine"]) for row in found["rows"])
    backends = list(dict.fromkeys(row["backend"] for row in found["rows"]))
    table = []
    for coarse, fine in variants:
        rows = [row for row in found["rows"] if (row["coarse"], row["fine"]) == (coarse, fine)]
        tops = [spread([row["top1"] for row in rows if row["backend"] == name], 1) for name in backends]
        table.append([str(coarse), str(fine), f"{mean(row['seconds'] for row in rows):.1f}", *tops])
    columns = [f"iterations at {found['side']} pixels", "at 28 pixels", "s", *(f"`{name}`" for name in backends)]
    return (
        "## Coarse to fine\n\n`spdfq_plus` on the bundled ViT at W3A3, with a first part of the iterations at a\n"
        "smaller size. Top-1, simulated, seeds 0 to 2, 1,000 test images; processor seconds of 32 images on one\n"
        "thread. It trades accuracy for time hardly better than fewer iterations do, so no recipe has it.\n\n"
        f"{_table(columns, table)}\n\nReproduce: `python benchmarks/coarse_to_fine.py`. Data: "
        "`benchmarks/results/coarse_to_fine.json`."
    )


def _length() -> str:
    """Accuracy over the number of iterations and of images."""
    iterations, images = rows_of("fmnist_vit_iterations"), rows_of("fmnist_vit_images")
    tables = [
        _over("iterations", 100, iterations, "backend", {"strong_w3a3": "`strong`", "plus_w3a3": "`plus`"}),
        _over("images", 32, images, "images", {"spdfq_plus": "`spdfq_plus`", "real_fmnist": "real images"}),
    ]
    return (
        "## Iterations and images\n\n"
        f"`spdfq_plus` on the bundled ViT at W3A3: top-1, simulated, seeds 0 to 2, {iterations[0].measured.images:,} "
        "test images.\nFirst 32 images of different lengths under two back-ends, then different numbers of images "
        "under `strong`, with\n100 iterations. There are 256 real images, so their last row has the same images with "
        "each seed. The defaults are\n100 iterations and 32 images: four times the iterations, or 32 times the images, "
        "gain about a point, and a quarter\nof the iterations loses about one. Three seeds hardly tell such changes "
        "from zero.\n\n"
        + "\n\n".join(tables)
        + f"\n\nMachine: {machines([*iterations, *images])}. Reproduce: `spdfq bench "
        "benchmarks/fmnist/iterations.toml`, `spdfq bench benchmarks/fmnist/images.toml`, `spdfq bench "
        "benchmarks/fmnist/images_512.toml`."
    )


def _over(what: str, default: int, rows: list[Row], kind: str, named: dict[str, str]) -> str:
    """Top-1 over one key of the synthesis, and its difference to the default, for each value of another axis."""
    key = f"synthesis.{what}"
    groups = groups_by(rows, lambda row: f"{row.axes[kind]} {row.axes[key]}")
    lines = []
    for count in sorted({row.axes[key] for row in rows}):
        cells = [f"{count:,}"]
        for value in named:
            own, usual = groups.get(f"{value} {count}"), groups[f"{value} {default}"]
            cells.append(spread([row.top1 for row in own.rows.values()], 1) if own else "")
            cells.append(str(difference(own, usual)) if own and count != default else "")
        lines.append(cells)
    return _table([what, *(text for name in named.values() for text in (name, f"over {default}"))], lines)


def _together() -> str:
    """What several groups in each pass of the teacher gain."""
    rows = []
    for name in TOGETHER:
        found = _read(name)
        for group in found["groups"]:
            ratios = ", ".join(f"{ratio:.2f} ({count})" for count, ratio in group["speed_up"].items())
            rows.append([NAMES.get(found["model"], found["model"]), str(group["images"]), ratios, f"`{name}`"])
    table = _table(["model", "images in a group", "speed-up (groups in each pass)", "file"], rows)
    return (
        "## Several groups in each pass\n\nImages of MimiQ with `synthesis.groups_per_pass`, against one group in each "
        f"pass, on 1 thread.\n\n{table}"
    )


def _ranks() -> str:
    """Two processes of one thread against one."""
    found = _read("ranks.json")
    rows = []
    for work in ("images", "evaluation", "learning"):
        one, two = (found[work]["seconds"]["clock"][count] for count in ("1", "2"))
        rows.append([work, f"{one:.1f}", f"{two:.1f}", f"{found[work]['efficiency']:.2f}"])
    table = _table(["work", "one process, s", "two, s", "efficiency"], rows)
    return (
        "## Two processes on one CPU\n\nGroups of `spdfq_plus` and the evaluation of the bundled ViT, and the\n"
        "reconstruction of two blocks of a ViT-S/16 at 224 pixels with 16 images, shared by two\n"
        f"processes of one thread with torchrun; median of {found['rounds']} rounds.\n\n{table}\n\nMachine: "
        f"{found['machine']['device']}, otherwise idle. Reproduce: `python benchmarks/ranks.py`. Data: "
        "`benchmarks/results/ranks.json`."
    )


def _machines() -> str:
    names = ("backends.json", "backends_one_thread.json", "backends_bfloat16.json", "backends_vit_base.json")
    rows = []
    for name in (
        "synthesis_overhead.json",
        *names,
        "losses.json",
        *PRUNED.values(),
        "coarse_to_fine.json",
        *TOGETHER,
        "ranks.json",
    ):
        machine = _read(name)["machine"]
        versions = f"torch {machine['versions']['torch']}, timm {machine['versions']['timm']}"
        load = f"{machine['load_before']:.1f}"
        rows.append([f"`{name}`", machine["device"], str(machine["threads"]), load, versions, machine["commit"][:7]])
    columns = ["file", "machine", "threads", "load before", "versions", "commit"]
    return "## Machines\n\nAll files are in `benchmarks/results/`.\n\n" + _table(columns, rows)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
