"""The files of result rows of a bench: those of a whole bench, and those of its shards."""

import json
from pathlib import Path
from typing import Any

from spdfq.errors import DataError

RESULTS = "results.jsonl"


def file_of(shard: tuple[int, int] | None) -> str:
    """The name of the file with the rows of a shard, or of the whole bench."""
    return RESULTS if shard is None else f"results-{shard[0]}-of-{shard[1]}.jsonl"


def row_files(folder: Path) -> list[Path]:
    """All files of rows in the folder of a bench, that of the whole bench first."""
    whole = folder / RESULTS
    return [*([whole] if whole.is_file() else []), *sorted(folder.glob("results-*-of-*.jsonl"))]


def plain_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of all files in the folder of a bench, as plain data.

    Raises:
        DataError: a file is damaged.
    """
    found = []
    for path in row_files(folder):
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found += [{**row, "axes": dict(row["axes"]), "seed": int(row["seed"])} for row in rows]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: damaged; remove it and run the bench again (finished stages are kept)") from None
    return found
