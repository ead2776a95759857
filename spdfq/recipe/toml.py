"""Plain data written as TOML; the standard library only reads it."""

import json
import re
from typing import Any

_LINE = 100
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(data: dict[str, Any]) -> str:
    """A TOML document of tables, arrays, strings, numbers and booleans that `tomllib` reads back to equal data."""
    return "\n".join(_table(data, ())).strip() + "\n"


def value(data: Any) -> str:
    """One value on one line; tables become inline tables."""
    if isinstance(data, bool):
        return str(data).lower()
    if isinstance(data, str):
        return json.dumps(data, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(data, dict):
        return "{ " + ", ".join(f"{key(name)} = {value(item)}" for name, item in data.items()) + " }" if data else "{}"
    if isinstance(data, (list, tuple)):
        return "[" + ", ".join(map(value, data)) + "]"
    if isinstance(data, (int, float)):
        return repr(data)
    raise TypeError(f"a {type(data).__name__} is no value of a recipe")


def key(*parts: str) -> str:
    """A dotted key, its parts quoted where they have to be."""
    return ".".join(part if _BARE.fullmatch(part) else value(part) for part in parts)


def is_table_list(data: Any) -> bool:
    """Whether a value is written as an array of tables (``[[name]]``)."""
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, dict) for item in data)


def _table(data: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    """The keys of a table, then its tables under their headers: TOML wants this order."""
    inline = bool(path) and all(_fits(name, item) for name, item in data.items() if isinstance(item, dict))
    lines, below = [], []
    for name, item in data.items():
        inner = (*path, name)
        if is_table_list(item):
            for table in item:
                below += ["", f"[[{key(*inner)}]]", *_table(table, inner)]
        elif isinstance(item, dict) and not inline:
            body = _table(item, inner)
            implied = bool(body) and not body[0]  # its first line is the header of a table inside it
            below += body if implied else ["", f"[{key(*inner)}]", *body]
        else:
            lines.append(f"{key(name)} = {value(item)}")
    return lines + below


def _fits(name: str, table: dict[str, Any]) -> bool:
    """Whether a table is small enough to be read on one line; its siblings must be too, or their order would change."""
    nested = any(isinstance(item, dict) or is_table_list(item) for item in table.values())
    return not nested and len(f"{key(name)} = {value(table)}") <= _LINE
