"""The keys in which recipes differ, and their values side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from spdfq.bench.groups import Group
from spdfq.errors import reading
from spdfq.recipe import read, toml

# a run's seed is a column of its own, and how it ran is not part of the method
_NOT_COMPARED = ("seed", "runtime", "controls", "published", "schema")
ABSENT = "-"


@frozen
class KeyDifference:
    """One key in which recipes differ.

    Args:
        key: dotted.
        values: as TOML, by the label of the group; ``-`` where a recipe does not have the key.
    """

    key: str
    values: dict[str, str]


def differing_keys(groups: list[Group]) -> tuple[list[KeyDifference], list[str]]:
    """Keys in which the groups' recipes differ, and the labels of the groups whose recipe is not there."""
    recipes = {group.label: _flat_recipe(group.folders[0]) for group in groups if group.folders}
    missing = [group.label for group in groups if not group.folders]
    every = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    found = []
    for key in sorted(every):
        values = {label: recipe.get(key, ABSENT) for label, recipe in recipes.items()}
        if len(set(values.values())) > 1:
            found.append(KeyDifference(key, values))
    return found, missing


def _flat_recipe(folder: Path) -> dict[str, str]:
    path = folder / "recipe.toml"
    data = read(str(path))
    with reading(path):  # a date is TOML, and not a value of a recipe
        return dict(_flat({key: value for key, value in data.items() if key not in _NOT_COMPARED}))


def _flat(table: dict[str, Any] | list[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as TOML; the steps of a back-end by their position."""
    for name, item in table.items() if isinstance(table, dict) else enumerate(table):
        dotted = f"{path}.{name}" if path else str(name)
        tables = isinstance(item, list) and item and all(isinstance(each, dict) for each in item)
        if isinstance(item, dict) or tables:
            yield from _flat(item, dotted)
        else:
            yield dotted, toml.value(item)
