"""The exported files of a run, as the page shows them."""

from pathlib import Path
from typing import Any

from spdfq.errors import DataError
from spdfq.report.json_file import read_json

EXPORTS_FILE = "exports.json"
EXPORT_AGAIN = "remove it and export again"
"""What to do about a damaged file."""
COLUMNS = (
    *("file", "format", "MB", "runtime", "test images", "top-1", "simulated", "agreement", "ms/image", "FP ms/image"),
    "integer products",
)
NUMERIC = (*COLUMNS[4:], "MB")


def known_exports(folder: Path) -> dict[str, Any]:
    """The contents of a run folder's ``exports.json``; empty without the file.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / EXPORTS_FILE
    found = read_json(path, EXPORT_AGAIN) if path.is_file() else {}
    if wrong := [name for name, entry in found.items() if not isinstance(entry, dict)]:
        raise DataError(f"{path}: damaged ({wrong[0]}: expected an object); {EXPORT_AGAIN}")
    return found


def exports_section(found: dict[str, Any]) -> dict[str, Any] | None:
    """The table and the notes of exported files; ``None`` without files.

    Raises:
        KeyError: an entry lacks a value that every entry has.
    """
    if not found:
        return None
    rows = [row for name, entry in found.items() for row in _rows(name, entry)]
    notes = {name: list(entry["notes"]) for name, entry in found.items() if entry["notes"]}
    floating = [
        f"{name}, {_runtime(row)}: computed in float: {float_products(row)}"
        for name, entry in found.items()
        for row in entry["measured"]
        if row["float_products"]
    ]
    return {"columns": COLUMNS, "numeric": NUMERIC, "rows": rows, "notes": notes, "floating": floating}


def _rows(name: str, entry: dict[str, Any]) -> list[tuple[Any, ...]]:
    start = name, entry["format"], f"{entry['size'] / 1e6:.2f}"
    if not entry["measured"]:
        return [(*start, "not measured", *[""] * (len(COLUMNS) - 4))]
    return [
        (
            *start,
            f"measured in {_runtime(row)}",
            row["images"],
            f"{row['top1']:.2f} %",
            f"{row['simulated_top1']:.2f} %",
            f"{row['agreement']:.2f} %",
            _milliseconds(row, "milliseconds"),
            _milliseconds(row, "float_milliseconds"),
            products(row),
        )
        for row in entry["measured"]
    ]


def measured_lines(found: dict[str, Any]) -> dict[str, list[str]]:
    """For each exported file its size, and what each runtime measured, for the head of the page.

    Raises:
        KeyError: an entry lacks a value that every entry has.
    """
    lines = {}
    for name, entry in found.items():
        lines[name] = [f"{entry['size'] / 1e6:.2f} MB"]
        for row in entry["measured"]:
            speed = f", {row['milliseconds']:.2f} ms/image" if "milliseconds" in row else ""
            lines[name].append(f"{row['top1']:.2f} %{speed} measured in {_runtime(row)}")
    return lines


def _milliseconds(row: dict[str, Any], key: str) -> str:
    """Rounded; empty for a file that an older version measured."""
    return f"{row[key]:.2f}" if key in row else ""


def _runtime(row: dict[str, Any]) -> str:
    return f"{row['runtime']} {row['version']}"


def float_products(row: dict[str, Any]) -> str:
    """The names of the products that a runtime computes in float, in short if these are all."""
    names = row["float_products"]
    return f"all {len(names)} products" if len(names) == row["products"] > 1 else ", ".join(names)


def products(row: dict[str, Any]) -> str:
    """How many of the quantized products a runtime computes in integers, and how many it does not show."""
    integer, every = row["integer_products"], row["products"]
    if integer is None:
        return ""
    hidden = every - integer - len(row["float_products"])
    return f"{integer} of {every}" + (f", {hidden} not shown by the runtime" if hidden > 0 else "")
