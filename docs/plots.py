"""The plots of the page of results, from the rows: python docs/plots.py (needs the extra ``docs``).

A heat map of images and back-ends, accuracy over bits, accuracy over seconds, and the effects of SPDFQ's open
constants. Each file stores a hash of the rows that it shows; `outdated` compares it without drawing anything.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image
from result_rows import rows_of
from results_page import IMAGES
from study_page import SCREENING, study

from spdfq.bench.rows import Row

FOLDER = Path(__file__).parent / "images"
HEAT = {
    "Bundled ViT, W3A3": (
        ("fmnist_vit_w3a3_matrix",),
        ("minmax", "repq", "adalog", "adaround", "blockwise", "ridge", "plus_adalog"),
    ),
    "Real ViT-S at 112 pixels, W4A4": (
        ("real_vit_112_repq_ridge", "real_vit_112_strong", "real_vit_112_strong_sources"),
        ("repq", "ridge", "strong"),
    ),
}
HEAT_IMAGES = ("real_fmnist", "spdfq_plus", "spdfq", "psaq_vit", "mimiq", "gaussian_noise")
BITS = {
    "Bundled ViT": (
        ("fmnist_vit_strong", "fmnist_vit_strong_others"),
        {"strong_w2a4": "W2A4", "strong_w3a3": "W3A3", "strong": "W4A4", "strong_w4a8": "W4A8"},
    ),
    "Real ViT-S at 112 pixels": (
        ("real_vit_112_strong", "real_vit_112_strong_w4a8", "real_vit_112_strong_sources"),
        {"strong_w3a3": "W3A3", "strong": "W4A4", "strong_w4a8_penalty_100": "W4A8"},
    ),
}
BITS_IMAGES = ("real_fmnist", "spdfq_plus", "gaussian_noise")
SECONDS = ("real_vit_112_matrix", "blockwise", "Intel")
COLOURS = {"real_fmnist": "#2a6f97", "spdfq_plus": "#c8553d", "gaussian_noise": "#6b7280"}
HASH = "Rows"


def heat_map() -> Any:
    """Mean top-1 of images and back-ends; a cell without rows is empty."""
    plt = _pyplot()
    widths = [len(backends) for _, backends in HEAT.values()]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), width_ratios=widths, layout="constrained")
    for axis, (title, (files, backends)) in zip(axes, HEAT.items(), strict=True):
        rows = rows_of(*files)
        table = [[_mean(rows, images, backend) for backend in backends] for images in HEAT_IMAGES]
        axis.imshow([[float("nan") if cell is None else cell for cell in line] for line in table], cmap="cividis")
        known = [cell for line in table for cell in line if cell is not None]
        middle = (min(known) + max(known)) / 2
        for y, line in enumerate(table):
            for x, cell in enumerate(line):
                if cell is not None:
                    axis.text(
                        x, y, f"{cell:.0f}", ha="center", va="center", color="white" if cell < middle else "black"
                    )
        axis.set_xticks(range(len(backends)), backends, rotation=35, ha="right")
        axis.set_yticks(range(len(HEAT_IMAGES)), map(_plain, HEAT_IMAGES) if axis is axes[0] else [])
        axis.set_title(title, fontsize=10)
    return figure


def over_bits() -> Any:
    """Top-1 of the back-end `strong` over the bits; bars are the standard deviation of the seeds."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    for axis, (title, (files, backends)) in zip(axes, BITS.items(), strict=True):
        rows = rows_of(*files)
        for images in BITS_IMAGES:
            found = {label: _top1(rows, images, backend) for backend, label in backends.items()}
            shown = {label: values for label, values in found.items() if values}
            if not shown:
                continue
            places = [list(backends.values()).index(label) for label in shown]
            means = [mean(values) for values in shown.values()]
            spreads = [_deviation(values) for values in shown.values()]
            colour = COLOURS[images]
            axis.errorbar(places, means, spreads, marker="o", capsize=3, color=colour, label=_plain(images))
        full = rows[0].measured.fp.top1
        axis.axhline(full, color="black", linewidth=0.8, linestyle="--", label=f"full precision {full:.1f}")
        axis.set_xticks(range(len(backends)), backends.values())
        axis.set_title(f"{title}, back-end strong", fontsize=10)
        axis.set_ylabel("top-1, simulated (%)")
        axis.legend(fontsize=8, frameon=False)
    return figure


def over_seconds() -> Any:
    """Top-1 over the seconds that the images took where they were made anew; only sources and rows of one machine."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 4), layout="constrained")
    file, backend, machine = SECONDS
    rows = [row for row in rows_of(file) if (row.device_name or "").startswith(machine) and not row.error]
    for images in IMAGES:
        own = [row for row in rows if row.axes["images"] == images]
        seconds = [_image_seconds(row) for row in own]
        made, values = [each for each in seconds if each is not None], _top1(own, images, backend)
        if made and values:
            axis.errorbar(mean(made), mean(values), _deviation(values), marker="o", capsize=3, color="#2a6f97")
            axis.annotate(_plain(images), (mean(made), mean(values)), xytext=(6, 5), textcoords="offset points", size=8)
    axis.set_xlim(-10, 380)
    axis.set_xlabel("seconds for 32 images, one thread (100 iterations where images are optimised)")
    axis.set_ylabel("top-1, simulated (%)")
    axis.set_title(f"Real ViT-S at 112 pixels, W4A4, back-end {backend}, {machine} Xeon", fontsize=10)
    return figure


def study_effects() -> Any:
    """The effect of each level of SPDFQ's open constants against the present one, with its interval."""
    plt = _pyplot()
    rows = rows_of(SCREENING)
    effects = study.main_effects(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10.6, 6.4), layout="constrained", sharey=True)
    for axis, (response, found) in zip(axes, effects.items(), strict=True):
        for y, each in enumerate(found):
            clear = each["low"] > 0 or each["high"] < 0
            axis.plot([each["low"], each["high"]], [y, y], color="#c8553d" if clear else "#9aa3ad", linewidth=2)
            axis.plot(each["effect"], y, "o", color="#c8553d" if clear else "#9aa3ad", markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", color="#e5e7eb")
        axis.set_axisbelow(True)
        axis.set_xlabel({"top1": "change of top-1", "agreement": "change of the agreement"}[response] + " (points)")
    labels = [
        f"{factor}: {level}{' *' if (factor, level) in study.OUTSIDE else ''}" for factor, level in study.columns()
    ]
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"SPDFQ's open constants on the bundled ViT, W3A3, ridge: {len(study.rows_by_cell(rows))} cells "
        f"at reduced length ({study.IMAGES} images, {study.ITERATIONS} iterations)\n"
        "Each against the present level, 95 % intervals; * contradicts the paper",
        fontsize=10,
    )
    return figure


# file name: what draws it, and the files of rows that it shows
PLOTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "results_heat_map.png": (heat_map, tuple(file for files, _ in HEAT.values() for file in files)),
    "results_over_bits.png": (over_bits, tuple(file for files, _ in BITS.values() for file in files)),
    "results_over_seconds.png": (over_seconds, SECONDS[:1]),
    "spdfq_study.png": (study_effects, (SCREENING,)),
}


def outdated() -> list[str]:
    """Names of the plots whose rows have changed since they were drawn."""
    return [name for name, (_, files) in PLOTS.items() if _stored(FOLDER / name) != _hash(files)]


def write() -> None:
    """Draw every plot."""
    plt = _pyplot()
    for name, (draw, files) in PLOTS.items():
        figure = draw()
        figure.savefig(FOLDER / name, dpi=140, metadata={HASH: _hash(files), "Software": None})
        plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _stored(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as picture:
        found = picture.info.get(HASH)
    return found if isinstance(found, str) else None


def _hash(files: Iterable[str]) -> str:
    """A hash of the numbers of the rows."""
    shown = [(row.axes, row.seed, row.metrics and row.top1, row.stages and row.seconds) for row in rows_of(*files)]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:20]


def _top1(rows: list[Row], images: str, backend: str) -> list[float]:
    return [row.top1 for row in rows if (row.axes["images"], row.axes["backend"]) == (images, backend)]


def _mean(rows: list[Row], images: str, backend: str) -> float | None:
    found = _top1(rows, images, backend)
    return mean(found) if found else None


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _image_seconds(row: Row) -> float | None:
    """Seconds of the stage that makes the images; ``None`` if they were reused."""
    stage = (row.stages or {}).get("images")
    return float(stage["seconds"]) if stage and not stage["reused"] else None


def _plain(images: str) -> str:
    return IMAGES[images].replace("`", "").replace(" (reference)", "")


if __name__ == "__main__":
    write()
