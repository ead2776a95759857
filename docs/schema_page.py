"""The page on result rows, from the attrs classes that check them."""

import typing

import attrs

from spdfq.bench import rows
from spdfq.recipe.describe import body, describe, plain
from spdfq.registry import first_paragraph


def schema_block() -> str:
    """A table for the row, and one for each table inside it."""
    classes = {"": rows.Row, **_tables(rows.Row)}
    return "\n\n".join(_section(path, cls) for path, cls in classes.items())


def _tables(cls: type, path: str = "") -> dict[str, type]:
    """The attrs classes inside a class, by their dotted path."""
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(cls).items():
        inner = next((each for each in (typing.get_args(hint) or (hint,)) if attrs.has(each)), None)
        if inner is not None:
            found[f"{path}{name}"] = inner
            found |= _tables(inner, f"{path}{name}.")
    return found


def _section(path: str, cls: type) -> str:
    fields = [
        f"| `{doc.name}` | {'table' if doc.type.startswith('table with') else doc.type} | "
        f"{'always' if doc.default == 'required' else 'may be null' if doc.default == 'none' else doc.default} | "
        f"{doc.doc} |"
        for doc in describe(cls)
    ]
    title = f"## `{path}`" if path else "## A row"
    table = "\n".join(["| field | type | | meaning |", "| --- | --- | --- | --- |", *fields])
    return "\n\n".join(filter(None, [title, plain(first_paragraph(cls)), body(cls), table]))
