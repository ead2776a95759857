"""Files that hold many images: which ones a pattern means, and when one of them is another than before."""

import glob
from pathlib import Path

from spdfq.errors import DataError


def matching(title: str, pattern: str) -> list[Path]:
    """The files that a path with ``*`` means, in alphabetical order.

    Raises:
        DataError: there are none.
    """
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise DataError(f"{title}: {pattern}: no such file; give files = 'path/to/shards-*' with the shards' suffix")
    return found


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, under which what was found in it is kept."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
