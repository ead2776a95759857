"""The files of result rows of a bench: those of a whole bench, and those of its shards."""

from pathlib import Path

from spdfq.bench.rows import Row, read_rows

RESULTS = "results.jsonl"


def file_of(shard: tuple[int, int] | None) -> str:
    """The name of the file with the rows of a shard, or of the whole bench."""
    return RESULTS if shard is None else f"results-{shard[0]}-of-{shard[1]}.jsonl"


def row_files(folder: Path) -> list[Path]:
    """All files of rows in the folder of a bench, that of the whole bench first."""
    whole = folder / RESULTS
    return [*([whole] if whole.is_file() else []), *sorted(folder.glob("results-*-of-*.jsonl"))]


def rows_in(folder: Path) -> list[Row]:
    """The rows of all files in the folder of a bench.

    Raises:
        DataError: a file is damaged, or was written by an older version.
    """
    return [row for path in row_files(folder) for row in read_rows(path)]
