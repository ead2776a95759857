"""What the names and keys of a recipe mean, from the docstrings of its components, for the report of a run."""

from collections.abc import Iterator
from typing import Any

import attrs

from spdfq.recipe import Recipe
from spdfq.recipe.describe import describe, plain
from spdfq.registry import REGISTRIES


def explained(recipe: Recipe) -> dict[str, dict[str, str]]:
    """What the names and the keys of a recipe mean, for ``explained.json``."""
    return {"names": explained_names(recipe), "keys": explained_keys(recipe)}


def explained_names(recipe: Recipe) -> dict[str, str]:
    """The kind and the summary of each component of a recipe, by its registered name and by the user's own name."""
    found: dict[str, list[str]] = {}
    for path, spec in _parts(recipe, ""):
        if line := _line(spec):
            lines = found.setdefault(_name(spec), [])
            lines += [line] if line not in lines else []
            section, _, own = path.rpartition(".")
            if section == "controls" or section.endswith(".losses"):  # tables with names that the user gives
                found.setdefault(own, [line])
    return {name: " ".join(lines) for name, lines in found.items()}


def explained_keys(recipe: Recipe) -> dict[str, str]:
    """The meaning of each key of a recipe, by its dotted path; items of arrays are numbered."""
    found = {}
    for path, spec in _parts(recipe, ""):
        start = f"{path}." if path else ""
        if line := _line(spec):
            found[f"{start}type"] = line
        found |= {f"{start}{key.name}": key.doc for key in describe(type(spec)) if key.doc}
    return found


def _parts(spec: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every attrs object in a spec with its dotted path."""
    if isinstance(spec, dict):
        inner = list(spec.items())
    elif isinstance(spec, (tuple, list)):
        inner = list(enumerate(spec))
    elif attrs.has(type(spec)):
        yield path, spec
        inner = [(field.name, getattr(spec, field.name)) for field in attrs.fields(type(spec)) if field.init]
    else:
        return
    for name, value in inner:
        yield from _parts(value, f"{path}.{name}" if path else str(name))


def _registration(spec: Any) -> Any:
    for registry in REGISTRIES.values():
        for name in registry.names():
            if registry.get(name) is type(spec):
                return registry.entry(name)
    return None


def _name(spec: Any) -> str:
    return str(_registration(spec).name)


def _line(spec: Any) -> str:
    """``Step. Choose the ranges ...``; empty for what is no component."""
    entry = _registration(spec)
    return f"{entry.kind.capitalize()}: {plain(entry.summary)}" if entry else ""
