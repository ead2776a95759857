"""A recipe with every value written out and a comment on every key: the file that ``spdfq init`` prints.

It is written line by line: tomlkit has no place for a comment between two entries of an array of tables.
"""

import textwrap
from typing import Any

import attrs

from spdfq.recipe import Recipe, toml
from spdfq.recipe.describe import FieldDoc, describe, keys, summary, table_of
from spdfq.recipe.structure import unstructure
from spdfq.registry import registry

_WIDTH = 100
_USAGE = (
    "Keys that are commented out are optional. `spdfq check FILE` finds mistakes, `spdfq list` lists all components, "
    "`spdfq show KIND NAME` explains one."
)


def commented(recipe: Recipe, title: str = "") -> str:
    """TOML that reads back as the same recipe, with a comment above every key.

    Args:
        recipe: the recipe.
        title: a sentence for the first comment.
    """
    return "\n".join([*_comment(title), *_comment(_USAGE), "", *_keys(recipe, ())]) + "\n"


def _keys(value: Any, path: tuple[str, ...], kind: str | None = None) -> list[str]:
    """The plain keys of a section, then the sections inside it, because TOML requires this order."""
    plain, inner = _type_line(value, path, kind), []
    for field, doc in zip(keys(type(value)), describe(type(value)), strict=True):
        item = getattr(value, field.name)
        if _is_section(item):
            inner += _sections(item, doc, (*path, doc.name), field.metadata.get("kind"))
        elif item is None and (table := table_of(type(value), field.name)):
            inner += _commented_out(table, doc, (*path, doc.name))
        else:
            plain += [*_comment(f"{doc.doc} ({doc.type})"), _assignment(doc.name, item)]
    return plain + inner


def _type_line(value: Any, path: tuple[str, ...], kind: str | None) -> list[str]:
    """The ``type`` of a component, unless the name of its table gives it already."""
    name = registry(kind).name_of(type(value)) if kind else None
    if kind is None or path[-1] == name:
        return []
    others = [other for other in registry(kind).names() if other != name]
    return [f"type = {toml.value(name)}" + (f"  # or {', '.join(others)}" if others else "")]


def _is_section(item: Any) -> bool:
    if isinstance(item, dict):
        return bool(item)
    first = item[0] if isinstance(item, tuple) and item else item
    return attrs.has(type(first))


def _sections(item: Any, doc: FieldDoc, path: tuple[str, ...], kind: str | None) -> list[str]:
    if isinstance(item, dict):
        parts = [(f"[{toml.key(*path, name)}]", part, (*path, name)) for name, part in item.items()]
    elif isinstance(item, tuple):
        parts = [(f"[[{toml.key(*path)}]]", part, path) for part in item]
    else:
        parts = [(f"[{toml.key(*path)}]", item, path)]
    known = f" ({doc.type}: {', '.join(registry(kind).names())})" if kind and len(parts) > 1 else ""
    lines = ["", *_comment(f"{doc.name}: {doc.doc}{known}")]
    for header, part, inner in parts:
        above = _comment(summary(type(part))) if kind else []
        lines += [*([""] if len(parts) > 1 else []), *above, header, *_keys(part, inner, kind)]
    return lines


def _commented_out(table: type, doc: FieldDoc, path: tuple[str, ...]) -> list[str]:
    """An optional section that the recipe does not have, with every key commented out."""
    lines = ["", *_comment(f"{doc.name}: {doc.doc}"), f"# [{toml.key(*path)}]"]
    for inner in describe(table):
        given = "" if inner.default in ("required", "none") else f" {inner.default}"
        required = ", required" if inner.default == "required" else ""
        lines += [*_comment(f"{inner.doc} ({inner.type}{required})"), f"# {inner.name} ={given}"]
    return lines


def _assignment(name: str, item: Any) -> str:
    return f"# {name} =" if item is None else f"{name} = {toml.value(unstructure(item))}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
