"""Plain data written as TOML, by tomlkit; the standard library only reads TOML."""

from typing import Any

import tomlkit
from tomlkit.items import AoT, InlineTable, Item, Table

_LINE = 100


def dumps(data: dict[str, Any]) -> str:
    """A TOML document that `tomllib` reads back as equal data.

    Small tables are written inline. Other tables get a section each, with a blank line above.

    Args:
        data: tables, arrays, strings, numbers and booleans.

    Raises:
        TypeError: a value of another type.
    """
    return _fill(tomlkit.document(), data).as_string().lstrip("\n")


def key(*parts: str) -> str:
    """A dotted key; its parts are quoted where TOML requires it."""
    return tomlkit.key(parts).as_string()


def value(data: Any) -> str:
    """One value on one line; tables become inline tables.

    Raises:
        TypeError: a value of a type that recipes do not have.
    """
    return _item(data).as_string()


def _fill(section: Any, data: dict[str, Any]) -> Any:
    """Add the keys of a table to a tomlkit document or table, plain values first because TOML requires it."""
    inline = isinstance(section, Table) and all(
        _is_short(name, it) for name, it in data.items() if isinstance(it, dict)
    )
    tables = {name: item for name, item in data.items() if _is_array_of_tables(item)}
    tables |= {} if inline else {name: item for name, item in data.items() if isinstance(item, dict)}
    for name, item in data.items():
        if name not in tables:
            section.append(name, _item(item))
    for name in data:
        if name in tables:
            section.append(name, _section(tables[name]))
    return section


def _is_array_of_tables(data: Any) -> bool:
    """Whether a value is written as ``[[name]]`` sections."""
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, dict) for item in data)


def _section(data: Any) -> Table | AoT:
    if isinstance(data, dict):
        # a table that holds only tables needs no header of its own
        only_tables = bool(data) and all(isinstance(item, dict) or _is_array_of_tables(item) for item in data.values())
        return _fill(tomlkit.table(is_super_table=only_tables), data)
    array = tomlkit.aot()
    for table in data:
        array.append(_fill(tomlkit.table(), table))
    return array


def _item(data: Any) -> Item:
    if isinstance(data, dict):
        return _inline_table(data)
    if isinstance(data, (list, tuple)):
        array = tomlkit.array()
        for item in data:
            array.append(_item(item))
        return array
    if isinstance(data, (bool, int, float, str)):
        return tomlkit.item(data)
    raise TypeError(f"a {type(data).__name__} is not a recipe value")


def _inline_table(data: dict[str, Any]) -> InlineTable:
    table = tomlkit.inline_table()
    items = {name: _item(item) for name, item in data.items()}
    for name, item in items.items():
        table.append(name, item)
    if items:  # spaces inside the braces
        first, *_, last = [*items.values()] * 2
        first.trivia.indent = last.trivia.trail = " "
    return table


def _is_short(name: str, table: dict[str, Any]) -> bool:
    """Whether a table fits on one line. A longer one gets a section, and so do its siblings, to keep their order."""
    nested = any(isinstance(item, dict) or _is_array_of_tables(item) for item in table.values())
    return not nested and len(value({name: table})) - len("{  }") <= _LINE
