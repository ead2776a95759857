"""The table of the README, from the rows of the quickstart's benchmark."""

from statistics import mean, stdev

from result_rows import groups_by, iterations_of, machines, rows_of
from spread import spread

from spdfq.bench.groups import difference
from spdfq.bench.rows import Row

IMAGES = {
    "real_fmnist": "real training images",
    "spdfq_plus": "`spdfq_plus`, this library's own recipe",
    "spdfq_spectral": "**SPDFQ** in natural coordinates: the quickstart",
    "psaq_vit": "PSAQ-ViT, on pixels",
    "spdfq_start": "natural noise: SPDFQ's images after one iteration",
    "gaussian_noise": "Gaussian noise",
}


def readme_block() -> str:
    """One row for each source of images: top-1, agreement, and the share of the gap that it closes."""
    rows = rows_of("fmnist_quickstart")
    found = {images: [row for row in rows if row.axes["images"] == images] for images in IMAGES}
    low, high = (_top1(found[images]) for images in ("gaussian_noise", "real_fmnist"))
    table = ["| images | top-1, W3A3 | agreement | gap closed |", "| --- | ---: | ---: | ---: |"]
    for images, name in IMAGES.items():
        top1, agreement = _top1(found[images]), mean(row.measured.agreement or 0.0 for row in found[images])
        deviation = stdev(row.top1 for row in found[images])
        gap = "" if top1 in (low, high) else f"{100 * (top1 - low) / (high - low):.0f} %"
        table.append(f"| {name} | {top1:.2f} ± {deviation:.2f} | {agreement:.2f} | {gap} |")
    return "\n".join([*table, "", _caption(rows)])


def _top1(rows: list[Row]) -> float:
    return mean(row.top1 for row in rows)


def _caption(rows: list[Row]) -> str:
    (backend,), (commit,) = {row.backend for row in rows}, {row.git_commit for row in rows}
    seeds, metrics = sorted({row.seed for row in rows}), rows[0].measured
    steps = ", ".join(f"`{step}`" for step in backend.steps or ())
    return (
        f"Full precision {metrics.fp.top1:.2f} %. Mean ± standard deviation of seeds {seeds[0]} to {seeds[-1]}, "
        f"{metrics.images:,} test images, simulated accuracy, back-end {steps}, placement `{backend.placement}`, first "
        f"and last layer 8 bits, 32 calibration images. One machine and one commit ({commit[:7]}): "
        f"{machines(rows)}. {_second_machine()} {_ahead(rows)} {_lengths()} Reproduce: `spdfq bench "
        "benchmarks/fmnist/quickstart.toml`."
    )


def _ahead(rows: list[Row]) -> str:
    """What the quickstart has over PSAQ-ViT."""
    groups = groups_by(rows, lambda row: row.axes["images"])
    found = difference(groups["spdfq_spectral"], groups["psaq_vit"])
    return f"The quickstart over PSAQ-ViT, with a 95 % interval: {found}."


def _lengths() -> str:
    """The iterations of the sources, and those of the papers."""
    own, psaq = iterations_of("fmnist/spdfq_spectral"), iterations_of("fmnist/psaq_vit")
    return f"Iterations: {own}, PSAQ-ViT {psaq}; both papers have {iterations_of('images/spdfq'):,}."


def _second_machine() -> str:
    """What another machine gave for the ends of the gap, over the same seeds."""
    rows = rows_of("fmnist_quickstart_second_machine")
    found = [
        f"{name} {spread([row.top1 for row in rows if row.axes['images'] == images])}"
        for images, name in (("real_fmnist", "real images"), ("gaussian_noise", "Gaussian noise"))
    ]
    return f"A second machine ({machines(rows)}) gave {' and '.join(found)}."
