"""Reading the JSON files of a run folder or of a bench."""

import json
from pathlib import Path
from typing import Any

from spdfq.errors import AGAIN, DataError, reading, shown


def read_json(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        remedy: the end of the message if it is damaged.

    Raises:
        DataError: the file is missing or damaged, or holds something else.
    """
    with reading(path, remedy):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged (expected an object, got {shown(found)}); {remedy}")
    return found
