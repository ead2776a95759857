"""Bench files: axes over recipes and over keys, and the recipe of each combination."""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import field, frozen, validators

from spdfq.bench.priority import check_first
from spdfq.errors import RecipeError
from spdfq.recipe import assign_all, digest, locate, merge, merge_parents, toml
from spdfq.recipe.files import merge_part, parsed
from spdfq.recipe.structure import structure

SCHEMA = 1
_SLUG = 100


@frozen(kw_only=True)
class Gap:
    """Two values of an axis, a worst and a best case; other values close a share of the gap.

    Args:
        axis: name of the axis, as in ``parents`` or ``keys``.
        floor: the value that closes 0 % of the gap (noise), as the table shows it.
        ceiling: the value that closes 100 % (real images), as the table shows it.
    """

    axis: str
    floor: str | int | float | bool
    ceiling: str | int | float | bool


@frozen(kw_only=True)
class Baseline:
    """The value of an axis that the other ones are compared with.

    Args:
        axis: name of the axis, as in ``parents`` or ``keys``.
        value: as the table shows it.
    """

    axis: str
    value: str | int | float | bool


@frozen(kw_only=True)
class BenchFile:
    """The contents of a bench file.

    Args:
        schema: version of the format.
        seeds: every combination runs once with each seed.
        base: recipe data of every run; may contain ``extends``.
        parents: axes; each value is a shipped recipe, a part or a file, or an array of these, merged into the base.
        keys: axes over dotted recipe keys, assigned after the parents are merged. A key with one value is no axis.
        first: cells that run before the others, each as values of some axes or of ``seed``.
        gap: the two values between which the closed share of a gap is measured.
        baseline: the value that the others are compared with, with an interval.
    """

    schema: int = field(default=SCHEMA, validator=validators.in_((SCHEMA,)))
    seeds: tuple[int, ...] = field(default=(0,), validator=validators.deep_iterable(validators.ge(0)))
    base: dict = field(factory=dict)
    parents: dict = field(factory=dict)
    keys: dict = field(factory=dict)
    first: tuple[dict, ...] = ()
    gap: Gap | None = None
    baseline: Baseline | None = None


@frozen
class Choice:
    """One value of an axis.

    Args:
        label: the value as tables show it.
        data: recipe data to merge into the base, for an axis over parents.
        value: the value to assign, for an axis over a key.
    """

    label: Any
    data: dict[str, Any] | None = None
    value: Any = None


@frozen
class Axis:
    """One axis of a bench.

    Args:
        name: of the axis; for an axis over a key, the dotted key.
        column: its heading in tables.
        choices: its values.
    """

    name: str
    column: str
    choices: tuple[Choice, ...]

    @property
    def constant(self) -> bool:
        """Whether it is a key with one value, which all cells share."""
        return len(self.choices) == 1 and self.choices[0].data is None


@frozen
class Combination:
    """One value of every axis.

    Args:
        values: the label of each axis's value, by the name of the axis.
        data: the merged recipe data.
        slug: a readable name, unique in the bench.
    """

    values: dict[str, Any]
    data: dict[str, Any]
    slug: str


@frozen
class Plan:
    """A bench file that has been read and checked.

    Args:
        name: of the file, without its suffix.
        axes: axes over parents, then over keys, in the order of the file; without keys that have one value.
        seeds: of every combination.
        combinations: the product of the axes.
        gap: as in `BenchFile`.
        baseline: as in `BenchFile`.
        warnings: a line for each value of ``[base]`` that a part replaces.
        first: as in `BenchFile`.
    """

    name: str
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    combinations: tuple[Combination, ...]
    gap: Gap | None
    baseline: Baseline | None = None
    warnings: tuple[str, ...] = ()
    first: tuple[dict[str, Any], ...] = ()

    @property
    def compared(self) -> str | None:
        """The axis along which rows are compared: that of the baseline or gap, or the only one."""
        named = self.baseline or self.gap
        return named.axis if named else self.axes[0].name if len(self.axes) == 1 else None


def read_plan(source: str) -> Plan:
    """Read a bench file.

    Args:
        source: path of a ``.toml`` file.

    Raises:
        RecipeError: with every problem of the file, each on a line with its dotted path.
    """
    path = locate(source)
    problems: list[str] = []
    data = parsed(path)
    if data.keys() & {"extends", "model", "synthesis", "quantization", "evaluation"}:
        raise RecipeError([f"{path}: is a recipe or part of a recipe; name it under [parents] of a bench file"])
    file = structure(BenchFile, data, "", problems)
    _refuse(problems)
    base = _base(file, path.parent, problems)
    axes = _axes(file, path.parent, problems)
    _refuse(problems)
    _check_values(file, axes, problems)
    labels = {axis.name: [choice.label for choice in axis.choices] for axis in axes if not axis.constant}
    check_first(file.first, labels, file.seeds, problems)
    _refuse(problems)
    warnings: list[str] = []
    combinations = _combinations(file, axes, base, problems, warnings)
    _refuse(problems)
    varying = tuple(axis for axis in axes if not axis.constant)
    once = tuple(dict.fromkeys(warnings))
    return Plan(path.stem, varying, file.seeds, combinations, file.gap, file.baseline, once, file.first)


def _refuse(problems: list[str]) -> None:
    """Raise if there are problems, each once: an axis with many values may repeat one."""
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _base(file: BenchFile, beside: Path, problems: list[str]) -> dict[str, Any]:
    """The recipe data of ``[base]``, merged with what it extends."""
    base: dict[str, Any] = {}
    try:
        base = merge_parents(copy.deepcopy(file.base), beside)
    except RecipeError as error:
        problems += [f"base: {problem}" for problem in error.problems]
    if "seed" in file.base:
        problems.append("base.seed: give seeds = [...] at the top instead")
    return base


def _axes(file: BenchFile, beside: Path, problems: list[str]) -> tuple[Axis, ...]:
    """The axes over parents, then those over keys, in the order of the file."""
    _distinct("seeds", file.seeds, problems)
    keys = dict(_flat(file.keys))
    over_parents = [_parents_axis(name, values, beside, problems) for name, values in file.parents.items()]
    over_keys = [_key_axis(key, keys, problems) for key in keys]
    problems += [f"keys.{key}: is the name of an axis in [parents] too" for key in keys if key in file.parents]
    return (*over_parents, *over_keys)


def _parents_axis(name: str, values: Any, beside: Path, problems: list[str]) -> Axis:
    path = f"parents.{name}"
    lists = [[value] if isinstance(value, str) else value for value in _distinct(path, values, problems)]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        problems.append(f"{path}: expected names of recipes, or arrays of names, got {toml.value(values)}")
        return Axis(name, name, ())
    choices = []
    for label, names in zip(_labels(lists), lists, strict=True):
        try:
            choices.append(Choice(label, merge_parents({"extends": names}, beside)))
        except RecipeError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
    return Axis(name, name, tuple(choices))


def _key_axis(key: str, keys: dict[str, Any], problems: list[str]) -> Axis:
    if key == "seed":
        problems.append("keys.seed: give seeds = [...] at the top instead")
    values = _distinct(f"keys.{key}", keys[key], problems)
    return Axis(key, _column(key, list(keys)), tuple(Choice(_label(value), value=value) for value in values))


def _distinct(path: str, values: Any, problems: list[str]) -> list[Any]:
    """The values of an array; a problem if there are none or two are equal."""
    try:
        shown = toml.value(values)
    except TypeError as error:  # a date, which no key has
        problems.append(f"{path}: {error}")
        return []
    if not isinstance(values, (list, tuple)):
        problems.append(f"{path}: expected an array of values, got {shown}")
        return []
    if not values:
        problems.append(f"{path}: is empty; give at least one value")
    repeated = [text for text, count in Counter(map(toml.value, values)).items() if count > 1]
    problems += [f"{path}: contains {text} more than once" for text in repeated]
    return list(values)


def _check_values(file: BenchFile, axes: tuple[Axis, ...], problems: list[str]) -> None:
    """A problem for each value of the gap and of the baseline that is not on its axis."""
    if file.gap:
        _check_on_axis("gap", file.gap.axis, {"floor": file.gap.floor, "ceiling": file.gap.ceiling}, axes, problems)
        if file.gap.floor == file.gap.ceiling:
            problems.append("gap: floor and ceiling are the same value; give two different ones")
    if file.baseline:
        _check_on_axis("baseline", file.baseline.axis, {"value": file.baseline.value}, axes, problems)


def _check_on_axis(table: str, axis: str, given: dict[str, Any], axes: tuple[Axis, ...], problems: list[str]) -> None:
    labels = {each.name: [choice.label for choice in each.choices] for each in axes}
    if axis not in labels:
        problems.append(f"{table}.axis: this file has no axis {axis!r} (axes: {', '.join(labels) or 'none'})")
        return
    values = labels[axis]
    problems += [
        f"{table}.{key}: {value!r} is not a value of {axis} (values: {', '.join(map(str, values))})"
        for key, value in given.items()
        if value not in values
    ]


def _combinations(
    file: BenchFile, axes: tuple[Axis, ...], base: dict[str, Any], problems: list[str], warnings: list[str]
) -> tuple[Combination, ...]:
    """One combination for each element of the product of the axes."""
    chosen = list(itertools.product(*(axis.choices for axis in axes)))
    slugs = [_slug(axes, choices) for choices in chosen]
    counts = Counter(slugs)
    return tuple(
        Combination(
            {axis.name: choice.label for axis, choice in zip(axes, choices, strict=True) if not axis.constant},
            _recipe_data(file, axes, choices, base, problems, warnings),
            slug if counts[slug] == 1 else f"{slug}-{digest([choice.label for choice in choices])[:6]}",
        )
        for choices, slug in zip(chosen, slugs, strict=True)
    )


def _recipe_data(
    file: BenchFile,
    axes: tuple[Axis, ...],
    choices: tuple[Choice, ...],
    base: dict[str, Any],
    problems: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """The base, merged with the chosen parents, and then with the chosen values of keys assigned."""
    data = base
    for axis, choice in zip(axes, choices, strict=True):
        if choice.data is not None:
            before, data = data, _with_part(data, choice.data, file.base)
            warnings += _replaced(file, before, data, f"{axis.name} = {choice.label}")
    data = copy.deepcopy(data)  # all combinations share the tables of the parents
    assignments = [
        f"{axis.name}={toml.value(choice.value)}"
        for axis, choice in zip(axes, choices, strict=True)
        if choice.data is None
    ]
    problems += [f"keys.{problem.removeprefix('--set ')}" for problem in assign_all(data, assignments)]
    return data


def _with_part(data: dict[str, Any], part: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Merge a part into recipe data, but keep what ``[base]`` itself sets and the part does not.

    A part that defines a section replaces it (see `merge_part`), including the keys that the bench file sets under
    ``[base]``. These are set again here, unless the section has another type now.
    """
    merged = merge_part(data, part)
    for section, settings in own.items():
        if section in part and _type(data.get(section)) == _type(part[section]):
            merged[section] = merge(settings, merged[section])
    return merged


def _replaced(file: BenchFile, before: dict[str, Any], after: dict[str, Any], part: str) -> Iterator[str]:
    """A line for each value that ``[base]`` itself sets and a part takes away, unless an axis sets that key."""
    old, new, axes = dict(_flat(before)), dict(_flat(after)), dict(_flat(file.keys))
    for key, own in _flat(file.base):
        if key in axes or old.get(key) != own or new.get(key) == own:
            continue
        kept = f"base.{key} = {toml.value(own)}: is not used with {part}, which"
        if key in new:
            yield f"{kept} sets {toml.value(new[key])}; to set it in every cell, give keys.{key} = [{toml.value(own)}]"
        else:
            yield f"{kept} has another type of {key.partition('.')[0]}; set it in a part of your own where it is meant"


def _type(section: Any) -> Any:
    """The type of a section; ``None`` if it does not give one."""
    return section.get("type") if isinstance(section, dict) else section


def _flat(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a file may write a key quoted or as nested tables."""
    for name, item in table.items():
        dotted = f"{path}.{name}" if path else name
        if isinstance(item, dict):
            yield from _flat(item, dotted)
        else:
            yield dotted, item


def _labels(lists: list[list[str]]) -> list[str]:
    """The names of the recipes, without their folders if they stay distinct."""
    short = [" + ".join(Path(name).stem for name in names) or "base" for names in lists]
    return short if len(set(short)) == len(short) else [" + ".join(names) or "base" for names in lists]


def _label(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else toml.value(value)


def _column(key: str, keys: list[str]) -> str:
    """The shortest end of a dotted key that no other key has: at least two parts, not starting with a list position."""
    parts = key.split(".")
    for count in range(2, len(parts)):
        tail = ".".join(parts[-count:])
        if not parts[-count].isdecimal() and sum(f".{other}".endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def _slug(axes: tuple[Axis, ...], choices: tuple[Choice, ...]) -> str:
    parts = [
        str(choice.label) if choice.data is not None else f"{axis.column}={choice.label}"
        for axis, choice in zip(axes, choices, strict=True)
        if not axis.constant
    ]
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(parts))[:_SLUG] or "base"
