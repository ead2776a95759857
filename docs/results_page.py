"""The page of results: tables for each model, from the rows, with the machine of every cell; and all files."""

from collections.abc import Callable, Iterable, Sequence
from string import ascii_lowercase
from typing import Any

from attrs import frozen
from result_rows import RESULTS, groups_by, iterations_of, rows_of
from spread import spread

from spdfq.bench.groups import difference
from spdfq.bench.rows import Row, read_rows

IMAGES = {
    "real_fmnist": "real images (reference)",
    "spdfq_plus": "`spdfq_plus`",
    "plus_random": "`spdfq_plus`, classes at random",
    "plus_msr_augmented": "SPDFQ in natural coordinates, jitter and flips",
    "spdfq_spectral": "SPDFQ in natural coordinates",
    "spdfq": "SPDFQ (APA + MSR + SL)",
    "apa_sl": "APA + SL",
    "spdfq_psaq": "SPDFQ + PSE",
    "psaq_vit": "PSAQ-ViT",
    "psaq_vit_v2": "PSAQ-ViT V2",
    "mimiq": "MimiQ",
    "maskaq": "MaskAQ",
    "smi": "SMI",
    "fdd": "FDD",
    "clamp_vit": "CLAMP-ViT",
    "d4c": "D4C's contrast (example plugin)",
    "cross_entropy": "cross-entropy + TV",
    "spdfq_start": "natural noise",
    "gaussian_noise": "Gaussian noise",
}

# names of back-ends in rows, and the shipped recipe part that they are or change
SHIPPED = {"plus_adalog": "plus", "adaround_500": "adaround", "adaround_w4a4": "adaround"}

# commits before 4fcf2a2, where `adaptive_log` chose its bases by a quarter of the features
OLD_BASES = {"38d60d3", "47c2fcf", "7cd605a", "245dd1b", "15cffb8", "efd1943"}


@frozen
class Column:
    """One column of a table.

    Args:
        heading: of the column.
        file: of the rows.
        backend: value of the axis ``backend``; ``None`` for a file without this axis.
    """

    heading: str
    file: str
    backend: str | None = None

    def rows(self) -> list[Row]:
        """The finished rows of the column."""
        return [row for row in rows_of(self.file) if row.axes.get("backend") == self.backend and not row.error]


@frozen
class ModelTable:
    """The table of one model.

    Args:
        title: heading on the page.
        columns: one for each back-end and width.
        note: what holds for all rows.
        commands: that make the rows.
        parts: recipe parts of the image sources whose iterations are named, in a folder of recipe parts.
        intervals: file whose sources are compared with PSAQ-ViT.
        pair: file where SPDFQ is compared with PSAQ-ViT under several back-ends.
    """

    title: str
    columns: tuple[Column, ...]
    note: str
    commands: tuple[str, ...]
    parts: tuple[str, ...] = ()
    intervals: str | None = None
    pair: str | None = None


def _of(file: str, *backends: str) -> tuple[Column, ...]:
    return tuple(Column(f"`{SHIPPED.get(name, name)}`", file, name) for name in backends)


# sources that are shorter on the bundled models than published
SHORT = (
    *("images/spdfq_plus", "fmnist/spdfq", "fmnist/apa_sl", "fmnist/spdfq_psaq", "fmnist/psaq_vit"),
    *("fmnist/psaq_vit_v2", "fmnist/mimiq", "fmnist/maskaq", "fmnist/smi", "fmnist/fdd", "fmnist/clamp_vit"),
    "fmnist/cross_entropy",
)
TABLES = (
    ModelTable(
        "The bundled ViT, W3A3",
        (
            Column("`ridge`, six seeds", "fmnist_quickstart"),
            Column("the same, second machine", "fmnist_quickstart_second_machine"),
            Column("100 iterations", "fmnist_d4c"),
            Column("`ridge`, symmetric weights, six seeds", "fmnist_quickstart_symmetric"),
            *_of("fmnist_vit_w3a3_matrix", "minmax", "repq", "adalog", "adaround", "blockwise", "ridge", "plus_adalog"),
        ),
        "Asymmetric weights, except in `minmax` and where the heading says so; one thread in rows of **b** and **c**.",
        (
            "benchmarks/fmnist/quickstart.toml",
            "benchmarks/fmnist/vit_w3a3_matrix.toml",
            "benchmarks/fmnist/vit_w3a3_methods.toml",
            "examples/d4c/bench.toml",
        ),
        parts=SHORT,
        intervals="fmnist_d4c",
        pair="fmnist_spdfq_psaq",
    ),
    ModelTable(
        "The bundled ViT, W4A4",
        _of("fmnist_vit_w4a4_matrix", "repq", "adaround_w4a4", "blockwise", "ridge", "strong"),
        "The test images played no part in any choice.",
        ("benchmarks/fmnist/vit_w4a4_matrix.toml",),
        parts=("fmnist/spdfq", "fmnist/psaq_vit", "fmnist/mimiq", "images/spdfq_plus"),
    ),
    ModelTable(
        "The bundled Swin, W3A3",
        (Column("`blockwise`", "fmnist_swin_w3a3"),),
        "Symmetric weights.",
        ("benchmarks/fmnist/swin_w3a3.toml",),
    ),
    ModelTable(
        "A real ViT-S/14 (DINOv2) at 112 pixels, W4A4",
        _of("real_vit_112_matrix", "minmax", "repq", "adalog", "adaround_500", "blockwise", "ridge", "plus_adalog"),
        "100 iterations, symmetric weights (except `adalog` and `plus`). `ridge` has AdaLog's quantizer after GELU, "
        "`adaround` 500 iterations of 8 images for each block. **†** Before a fix: the "
        "bases of `adaptive_log` were chosen by a quarter of the features. With the fix real images kept "
        "72.0, cross-entropy and MimiQ gained 6 points, and the others changed by up to 3 (`real_vit_112_old_bases`).",
        ("benchmarks/real_vit/matrix.toml", "benchmarks/real_vit/methods.toml", "benchmarks/real_vit/w4a4.toml"),
    ),
    ModelTable(
        "The real ViT with asymmetric weights",
        (
            Column("`repq`, W4A4", "real_vit_112_repq_ridge", "repq"),
            Column("`ridge`, W4A4", "real_vit_112_repq_ridge", "ridge"),
            Column("`repq`, W3A3", "real_vit_112_repq_ridge_w3a3", "repq_w3a3"),
            Column("`ridge`, W3A3", "real_vit_112_repq_ridge_w3a3", "ridge_w3a3"),
        ),
        "100 iterations; the test images played no part in any choice. `ridge` as above. "
        "[Another page](uniform-backend.md) has `strong` on the same images.",
        ("benchmarks/real_vit/repq_ridge.toml", "benchmarks/real_vit/repq_ridge_w3a3.toml"),
    ),
)


def results_block() -> str:
    """Every table under its heading."""
    return "\n\n".join(map(_model, TABLES))


def _model(of: ModelTable) -> str:
    columns = [column.rows() for column in of.columns]
    every = [row for rows in columns for row in rows if row.axes["images"] in IMAGES]
    marks = Marks(every)
    table = [
        "| images | " + " | ".join(column.heading for column in of.columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for images, name in IMAGES.items():
        cells = [[row for row in rows if row.axes["images"] == images] for rows in columns]
        if any(cells):
            table.append(f"| {name} | " + " | ".join(_cell(rows, marks) for rows in cells) + " |")
    commands = ", ".join(f"`spdfq bench {path}`" for path in of.commands)
    full, tested = _one(row.measured.fp.top1 for row in every), _one(row.measured.images for row in every)
    placement = _one(row.backend.placement for row in every)
    compared = [
        *([_intervals(of.intervals)] if of.intervals else []),
        *([_pair(of.pair)] if of.pair else []),
    ]
    return (
        f"## {of.title}\n\n"
        + "\n".join(table)
        + f"\n\nFull precision {full:.2f} %, {tested:,} test images, 32 calibration images, placement `{placement}`, "
        f"first and last layer 8 bits. {of.note} {_lengths(of.parts)}{marks.legend()} Reproduce: {commands}."
    ) + (f"\n\n{' '.join(compared)}" if compared else "")


def _lengths(parts: Sequence[str]) -> str:
    """The iterations of image sources, shortest first; nothing without parts."""
    named: dict[int, list[str]] = {}
    for part in parts:
        named.setdefault(iterations_of(part), []).append(IMAGES[part.split("/")[1]].removesuffix(" (APA + MSR + SL)"))
    if not named:
        return ""
    said = "; ".join(f"{count} for {', '.join(named[count])}" for count in sorted(named))
    return f"Iterations: {said}. The papers have 1,000 to 4,000, so this table does not rank the methods as published. "


def _intervals(file: str) -> str:
    """What the sources of a file have over PSAQ-ViT."""
    groups = groups_by(rows_of(file), lambda row: str(row.axes["images"]))
    psaq = groups.pop("psaq_vit")
    parts = [f"{IMAGES[images]} {difference(group, psaq)}" for images, group in groups.items()]
    return f"100 iterations, over PSAQ-ViT (95 % over seeds and test images): {'; '.join(parts)}."


def _pair(file: str) -> str:
    """What SPDFQ has over PSAQ-ViT under each back-end of a file."""
    rows = rows_of(file)
    groups = groups_by(rows, lambda row: f"{row.axes['images']} {row.axes['backend']}")
    backends = dict.fromkeys(str(row.axes["backend"]) for row in rows)
    parts = [f"`{name}` {difference(groups[f'spdfq {name}'], groups[f'psaq_vit {name}'])}" for name in backends]
    return (
        f"SPDFQ over PSAQ-ViT on {_one(row.measured.images for row in rows):,} other images, "
        f"{len({row.seed for row in rows})} seeds: {'; '.join(parts)} "
        "(`spdfq bench benchmarks/fmnist/spdfq_psaq.toml`)."
    )


class Marks:
    """A letter for each machine and precision of rows, if there are several."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.commits: dict[str, dict[str, None]] = {}
        for row in rows:
            commit = row.git_commit[:7] if row.git_commit else "not recorded"
            self.commits.setdefault(machine_of(row), {})[commit] = None
        self.letters = dict(zip(sorted(self.commits), ascii_lowercase, strict=False))

    def of(self, rows: list[Row]) -> str:
        """The letters of the machines that the rows were measured on."""
        found = "".join(sorted({self.letters[machine_of(row)] for row in rows}))
        return f" {found}" if len(self.letters) > 1 else ""

    def legend(self) -> str:
        """What the letters mean."""
        several = len(self.letters) > 1
        said = [
            f"{f'**{letter}** ' if several else ''}{machine} (commit{'s' * (len(commits) > 1)} {', '.join(commits)})"
            for machine, letter in self.letters.items()
            for commits in [self.commits[machine]]
        ]
        return f"{'Machines' if several else 'One machine'}: {'; '.join(said)}."


def machine_of(row: Row) -> str:
    """Processor and precision."""
    name = (row.device_name or "not recorded").replace("(R)", "")
    return f"{name}, {row.precision}" if row.precision else name


def _cell(rows: list[Row], marks: Marks) -> str:
    if not rows:
        return ""
    old = any(row.axes.get("backend") == "ridge" and (row.git_commit or "")[:7] in OLD_BASES for row in rows)
    return f"{spread([row.top1 for row in rows], 1)} ({len(rows)}){marks.of(rows)}{'†' if old else ''}"


def _one(values: Iterable[Any]) -> Any:
    """The value that all have.

    Raises:
        ValueError: they differ, so a caption cannot name one.
    """
    (value,) = set(values)
    return value


def files_block() -> str:
    """Every file of rows: how many, of which model and machines."""
    table = ["| file | rows | model | bits | machines |", "| --- | ---: | --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = read_rows(path)
        listed: list[Callable[[Row], str | None]] = [
            lambda row: row.model.name,
            lambda row: row.backend.label,
            lambda row: row.device_name and machine_of(row),
        ]
        found = [dict.fromkeys(text for row in rows if (text := each(row))) for each in listed]
        cells = ["; ".join(texts) or "not recorded" for texts in found]
        table.append(f"| `{path.stem}` | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(table)
