"""Recipe files as plain data: found, read, merged with the parts they extend, and overridden."""

import copy
import difflib
import tomllib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from spdfq.errors import RecipeError

# what a part says that holds the whole of a section
_WHOLE = {"synthesis": "type", "quantization": "steps"}


def resolve(source: str | Path | dict[str, Any], overrides: Iterable[str] = (), seed: int | None = None) -> dict:
    """The merged plain data of a recipe, before it is checked."""
    data = merge_parents(dict(source), Path()) if isinstance(source, dict) else read(str(source))
    if problems := assign_all(data, overrides):
        raise RecipeError(problems)
    if seed is not None:
        data["seed"] = seed
    return data


def shipped() -> list[str]:
    """Names of the shipped recipes and parts, for example ``quickstart`` and ``images/spdfq``."""
    root = Path(str(files("spdfq.recipes")))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml"))


def whole(name: str) -> bool:
    """Whether a shipped recipe can be run as it is; others are parts to be extended."""
    return {"model", "synthesis", "quantization", "evaluation"} <= read(name).keys()


def locate(name: str, beside: Path = Path()) -> Path:
    """The file of a recipe: a path where the name ends in ``.toml``, a shipped recipe otherwise."""
    if name.endswith(".toml"):
        path = beside / name
        if not path.is_file():
            raise RecipeError([f"{name}: no such file; to run a shipped recipe leave out '.toml'"])
        return path
    if name not in shipped():
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        top = ", ".join(known for known in shipped() if whole(known))
        raise RecipeError([f"{name}: no shipped recipe of that name{hint} (shipped: {top}; a file ends in .toml)"])
    return Path(str(files("spdfq.recipes"))) / f"{name}.toml"


def read(name: str, beside: Path = Path(), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged plain data of a recipe file and all it extends."""
    path = locate(name, beside)
    if path.resolve() in chain:
        raise RecipeError([f"{name}: extends itself by way of {' -> '.join(p.stem for p in chain)}"])
    return merge_parents(parsed(path), path.parent, (*chain, path.resolve()), f"{path}: ")


def parsed(path: Path) -> dict[str, Any]:
    """The plain data of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of TOML, of UTF-8, or a number of too many digits
        raise RecipeError([f"{path}: not valid TOML: {error}"]) from None
    except RecursionError:
        raise RecipeError([f"{path}: not valid TOML: brackets nested too deeply"]) from None


def merge_parents(data: dict[str, Any], beside: Path, chain: tuple[Path, ...] = (), where: str = "") -> dict[str, Any]:
    """Merge the parents named under ``extends`` from left to right, then the data itself."""
    parents = data.pop("extends", [])
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise RecipeError([f"{where}extends: expected an array of recipe names, got {parents!r}"])
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = lay_over(merged, read(parent, beside, chain))
    return merge(merged, data)


def lay_over(data: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Merge a part over others; its whole source of images or back-end replaces one that is there, lest they mix."""
    both = [section for section in _WHOLE if _is_whole(data, section) and _is_whole(part, section)]
    return merge({section: content for section, content in data.items() if section not in both}, part)


def _is_whole(data: dict[str, Any], section: str) -> bool:
    """Whether a section is a component's name, or says what only a whole one does."""
    content = data.get(section)
    return isinstance(content, str) or (isinstance(content, dict) and _WHOLE[section] in content)


def merge(parent: Any, child: Any, path: tuple[str, ...] = ()) -> Any:
    """Tables merge key by key; a table of another ``type``, a list or a value replaces its parent's.

    A bare name counts as ``{ type = name }``, and a loss without a type has that of its key, the last of ``path``. The
    result shares nothing with either.
    """
    if isinstance(child, dict) and isinstance(parent, str):
        parent = {"type": parent}
    if isinstance(parent, dict) and "type" in parent and isinstance(child, str):
        child = {"type": child}
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return copy.deepcopy(child)
    if "type" in child and child["type"] != parent.get("type", _implied(path, child["type"])):
        return copy.deepcopy(child)
    merged = copy.deepcopy({**parent, **child})
    return merged | {key: merge(parent[key], child[key], (*path, key)) for key in parent.keys() & child.keys()}


def _implied(path: Sequence[str], otherwise: str) -> str:
    """The type of a table that does not say it."""
    return path[-1] if list(path[-2:-1]) == ["losses"] else otherwise


def assign_all(data: dict[str, Any], assignments: Iterable[str]) -> list[str]:
    """Carry out assignments on the merged data, and return what is wrong with them.

    Whole tables and types come before what is in them, whatever the order: a type would discard what was set.
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
    """Carry out ``dotted.key=value`` on the merged data; whether the key exists is checked with the whole recipe.

    Another ``type`` discards the options of the one before, as it does in `merge`.
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
    if last == "type" and table.get("type", _implied(parents, value)) != value:
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
    if isinstance(inner, str):  # the shorthand for a component without options
        inner = table[slot] = {"type": inner}
    if not isinstance(inner, (dict, list)):
        raise RecipeError([f"--set {key}: {part!r} is a value, it has no keys"])
    return inner


def _index(table: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(table):
        held = f"0 to {len(table) - 1}" if table else "it is empty"
        raise RecipeError([f"--set {key}: {part!r} is not a position of this list ({held})"])
    return int(part)
