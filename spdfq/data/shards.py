"""Files that hold many images: finding them by a pattern, and noticing that they changed."""

import glob
from pathlib import Path

from spdfq.errors import MissingDataError


def matching_files(title: str, pattern: str) -> list[Path]:
    """The files that match a path with ``*``, in alphabetical order.

    Raises:
        MissingDataError: no file matches.
    """
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise MissingDataError(
            f"{title}: {pattern}: no such file; give files = 'path/to/shards-*' with the shards' suffix"
        )
    return found


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file. What was read from it stays valid while they stay the same."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
