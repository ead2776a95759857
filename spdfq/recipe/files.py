"""Recipe files as plain data: finding, reading, merging and overriding."""

import copy
import difflib
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from spdfq.errors import RecipeError, shown

# a part that gives this key defines its section completely
_DEFINED_BY = {"synthesis": "type", "quantization": "steps"}


def listed(overrides: Iterable[str]) -> tuple[str, ...]:
    """Overrides as a tuple.

    Raises:
        RecipeError: they are one string, a dict or no strings.
    """
    several = isinstance(overrides, Iterable) and not isinstance(overrides, (str, dict))
    given = tuple(overrides) if several else ()
    if not several or not all(isinstance(each, str) for each in given):
        example = "['synthesis.images=4']"
        raise RecipeError([f"overrides: expected a list of 'key=value' strings, {example}, got {shown(overrides)}"])
    return given


def resolve(source: str | Path | dict[str, Any], overrides: Iterable[str] = (), seed: int | None = None) -> dict:
    """The merged plain data of a recipe, before it is checked.

    Args:
        source: the name of a shipped recipe, the path of a ``.toml`` file, or plain data.
        overrides: ``dotted.key=value`` pairs, the value as TOML.
        seed: replaces the recipe's own seed.

    Raises:
        RecipeError: a file is missing or not valid TOML, or an override cannot be applied.
    """
    if not isinstance(source, (str, Path, dict)):
        raise RecipeError([f"recipe: expected a Recipe, a name, a .toml path or a dict, got {shown(source)}"])
    overrides = listed(overrides)
    data = merge_parents(dict(source), Path()) if isinstance(source, dict) else read(str(source))
    if problems := assign_all(data, overrides):
        raise RecipeError(problems)
    if seed is not None:
        data["seed"] = seed
    return data


def shipped() -> list[str]:
    """Names of the shipped recipes and parts, for example ``quickstart`` and ``images/spdfq``."""
    return list(_shipped())


@cache
def _shipped() -> tuple[str, ...]:
    root = Path(str(files("spdfq.recipes")))
    return tuple(sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml")))


def is_complete(name: str) -> bool:
    """Whether a shipped recipe can be run; the others are parts that recipes extend."""
    return {"model", "synthesis", "quantization", "evaluation"} <= read(name).keys()


def locate(name: str, beside: Path = Path()) -> Path:
    """The file of a recipe: a path if the name ends in ``.toml``, otherwise a shipped recipe."""
    if not name:
        raise RecipeError(["recipe: the name is empty; 'spdfq list recipe' shows all names"])
    path = beside / name
    if path.is_dir() and name not in shipped():
        raise RecipeError([f"{name}: is a folder; give the recipe.toml inside it, or another .toml file"])
    if name.endswith(".toml"):
        if not path.is_file():
            raise RecipeError([f"{name}: no such file; to run a shipped recipe leave out '.toml'"])
        return path
    if name not in shipped():
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        top = ", ".join(known for known in shipped() if is_complete(known))
        raise RecipeError(
            [f"{name}: no shipped recipe of that name{hint} (shipped: {top}; the name of a file ends in .toml)"]
        )
    return Path(str(files("spdfq.recipes"))) / f"{name}.toml"


def read(name: str, beside: Path = Path(), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged plain data of a recipe file and of everything it extends."""
    path = locate(name, beside)
    if path.resolve() in chain:
        raise RecipeError([f"{name}: extends itself through {' -> '.join(p.stem for p in chain)}"])
    return merge_parents(parsed(path), path.parent, (*chain, path.resolve()), f"{path}: ")


def parsed(path: Path) -> dict[str, Any]:
    """The plain data of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # invalid TOML or UTF-8, or a number with too many digits
        raise RecipeError([f"{path}: not valid TOML: {error}"]) from None
    except RecursionError:
        raise RecipeError([f"{path}: not valid TOML: brackets nested too deeply"]) from None


def merge_parents(data: dict[str, Any], beside: Path, chain: tuple[Path, ...] = (), where: str = "") -> dict[str, Any]:
    """Merge the parents named under ``extends`` from left to right, then the data itself.

    Args:
        data: of a recipe; ``extends`` is removed from it.
        beside: the folder that paths of parents are relative to.
        chain: the files that extend one another to get here, to find a file that extends itself.
        where: the start of an error message.

    Raises:
        RecipeError: a parent is missing or is not valid TOML.
    """
    parents = data.pop("extends", [])
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise RecipeError([f"{where}extends: expected an array of recipe names, got {parents!r}"])
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge_part(merged, read(parent, beside, chain))
    return merge(merged, data)


def merge_part(data: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Merge a part of a recipe into the parts before it.

    A section is replaced instead of merged if both define it completely, so that two image sources or two back-ends
    never mix.
    """
    replaced = [section for section in _DEFINED_BY if _defines(data, section) and _defines(part, section)]
    return merge({section: content for section, content in data.items() if section not in replaced}, part)


def _defines(data: dict[str, Any], section: str) -> bool:
    """Whether data defines a section completely: by a component's name alone, or with the section's defining key."""
    content = data.get(section)
    return isinstance(content, str) or (isinstance(content, dict) and _DEFINED_BY[section] in content)


def merge(parent: Any, child: Any, path: tuple[str, ...] = ()) -> Any:
    """Merge tables key by key; a list, a value or a table of another ``type`` replaces what the parent has.

    A string in place of a table is short for ``{ type = string }``.

    Args:
        parent: plain data.
        child: plain data, whose values take precedence.
        path: keys that lead to both.

    Returns:
        A copy that shares no table or list with either.
    """
    if isinstance(child, dict) and isinstance(parent, str):
        parent = {"type": parent}
    if isinstance(parent, dict) and "type" in parent and isinstance(child, str):
        child = {"type": child}
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return copy.deepcopy(child)
    if path == ("controls",) and not child:
        return {}  # an empty table drops the controls of the recipe that is extended
    if "type" in child and _changes_type(parent, child["type"], path):
        return copy.deepcopy(child)
    merged = copy.deepcopy({**parent, **child})
    return merged | {key: merge(parent[key], child[key], (*path, key)) for key in parent.keys() & child.keys()}


def _changes_type(table: dict[str, Any], new: Any, path: Sequence[str]) -> bool:
    """Whether a new ``type`` differs from that of a table, so that the table's options no longer apply.

    The type of a loss or a control without ``type`` is its key, the last one of the path. Other tables without ``type``
    keep their options, because their type is not known here.
    """
    is_named = path[-2:-1] and path[-2] in ("losses", "controls")
    return bool(table.get("type", path[-1] if is_named else new) != new)


def assign_all(data: dict[str, Any], assignments: Iterable[str]) -> list[str]:
    """Apply ``dotted.key=value`` assignments to the data, and return the problems found.

    Tables and types are assigned before the keys inside them, whatever their order, because a new type discards the
    options of the old one.
    """
    problems: list[str] = []
    for assignment in sorted(assignments, key=_depth):
        try:
            assign(data, assignment)
        except RecipeError as error:
            problems += error.problems
    return problems


def _depth(assignment: str) -> int:
    parts = assignment.partition("=")[0].strip().split(".")
    return len(parts) - (parts[-1] == "type")


def assign(data: dict[str, Any], assignment: str) -> None:
    """Apply one ``dotted.key=value`` assignment. Whether the key exists is checked later, with the complete recipe.

    A new ``type`` discards the options of the old one, as in `merge`.

    Raises:
        RecipeError: the assignment is not of this form, or leads into a value that has no keys.
    """
    key, separator, text = (part.strip() for part in assignment.partition("="))
    if not separator or not key:
        raise RecipeError([f"--set {assignment}: expected key=value, for example quantization.weights.bits=3"])
    value = _toml_value(key, text)
    *parents, last = key.split(".")
    table: Any = data
    for part in parents:
        table = _descend(table, part, key)
    if isinstance(table, list):
        table[_index(table, last, key)] = value
        return
    if last == "type" and _changes_type(table, value, parents):
        table.clear()
    table[last] = value


def _toml_value(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    if parsed.keys() != {"value"}:
        raise RecipeError(
            [f"--set {key}={text}: the value is not TOML; strings need quotes: '{key}=\"{text}\"'"]
        ) from None
    return parsed["value"]


def _descend(table: Any, part: str, key: str) -> Any:
    slot: Any = _index(table, part, key) if isinstance(table, list) else part
    inner = table[slot] if isinstance(table, list) else table.setdefault(slot, {})
    if isinstance(inner, str):  # short for a component without options
        inner = table[slot] = {"type": inner}
    if not isinstance(inner, (dict, list)):
        raise RecipeError([f"--set {key}: {part!r} is a value and has no keys"])
    return inner


def _index(table: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(table):
        held = f"0 to {len(table) - 1}" if table else "it is empty"
        raise RecipeError([f"--set {key}: {part!r} is not a position of this list ({held})"])
    return int(part)
