"""The key of a state file: a hash of what its contents depend on, so that other work does not continue from it."""

from pathlib import Path
from typing import Any

import attrs

from spdfq.errors import DataError
from spdfq.recipe import digest


def state_key(*parts: Any) -> str:
    """A hash of plain data and of attrs objects, registered or not.

    An object counts by its class and by its fields, without those that are no arguments or have ``eq=False``. What no
    recipe can hold, such as a function or a tensor in a component of your own, counts by its name alone.
    """
    return digest(*map(_plain, parts))


def check_state_key(path: Path, metadata: dict[str, str], key: str) -> None:
    """Check that a state file belongs to the work with this key.

    Raises:
        DataError: it has another key, or none, as files of older versions.
    """
    if metadata.get("key") != key:
        raise DataError(
            f"{path}: is the state of another model, of other settings, seed or images, or of an older version; give "
            "another folder, or delete it"
        )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    kind = type(value)
    if attrs.has(kind):
        fields = [field.name for field in attrs.fields(kind) if field.init and field.eq]
        return [f"{kind.__module__}.{kind.__qualname__}", {name: _plain(getattr(value, name)) for name in fields}]
    return getattr(value, "__qualname__", kind.__qualname__)
