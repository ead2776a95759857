"""Bench files: axes over parents and over keys, and the recipes of their combinations."""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import field, frozen, validators

from spdfq.errors import RecipeError
from spdfq.recipe import assign_all, digest, locate, merge, merge_parents, toml
from spdfq.recipe.files import lay_over, parsed
from spdfq.recipe.structure import structure

SCHEMA = 1
_SLUG = 100


@frozen(kw_only=True)
class Gap:
    """Two values of an axis; every other row's share of the way from one to the other is shown.

    Args:
        axis: name of the axis, as in ``parents`` or ``keys``.
        floor: the value that closes nothing of the gap (noise), as the table shows it.
        ceiling: the value that closes all of it (real images), as the table shows it.
    """

    axis: str
    floor: str | int | float | bool
    ceiling: str | int | float | bool


@frozen(kw_only=True)
class BenchFile:
    """What stands in a bench file.

    Args:
        schema: version of the format.
        seeds: every combination runs once with each.
        base: recipe data of every cell; may hold ``extends``.
        parents: axes; each value is a shipped recipe, part or file, or an array of such, merged over the base.
        keys: axes over dotted recipe keys, assigned after the parents.
        gap: what the share of the gap that a row closes is measured between.
    """

    schema: int = field(default=SCHEMA, validator=validators.in_((SCHEMA,)))
    seeds: tuple[int, ...] = field(default=(0,), validator=validators.deep_iterable(validators.ge(0)))
    base: dict = field(factory=dict)
    parents: dict = field(factory=dict)
    keys: dict = field(factory=dict)
    gap: Gap | None = None


@frozen
class Choice:
    """One value of an axis.

    Args:
        shown: how tables show it.
        data: recipe data merged over the base, for an axis over parents.
        value: what is assigned, for an axis over a key.
    """

    shown: Any
    data: dict[str, Any] | None = None
    value: Any = None


@frozen
class Axis:
    """One axis of a bench.

    Args:
        name: of the axis, or the dotted key it is over.
        column: its heading in tables.
        choices: its values.
    """

    name: str
    column: str
    choices: tuple[Choice, ...]


@frozen
class Combination:
    """One value of every axis.

    Args:
        values: what is shown of each axis's value, by the name of the axis.
        data: the merged recipe data.
        slug: readable and unique in the bench.
    """

    values: dict[str, Any]
    data: dict[str, Any]
    slug: str


@frozen
class Plan:
    """What a bench file asks for.

    Args:
        name: of the file.
        axes: in the order of the file, parents first.
        seeds: of every combination.
        combinations: all of them.
        gap: what shares of a gap are measured between, where the file says so.
    """

    name: str
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    combinations: tuple[Combination, ...]
    gap: Gap | None


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
        raise RecipeError(
            [f"{path}: is a recipe or a part of one, not a bench file; name it under [parents] of a bench file"]
        )
    spec = structure(BenchFile, data, "", problems)
    if problems:
        raise RecipeError(problems)
    return _Reader(spec, path.parent).plan(path.stem)


class _Reader:
    """A structured bench file on its way to a plan; collects problems."""

    def __init__(self, spec: BenchFile, beside: Path) -> None:
        self.spec, self.beside = spec, beside
        self.problems: list[str] = []

    def plan(self, name: str) -> Plan:
        base = self._base()
        if "seed" in self.spec.base:
            self.problems.append("base.seed: give seeds = [...] at the top instead")
        self._check_values("seeds", self.spec.seeds)
        keys = dict(_flat(self.spec.keys))
        axes = (*map(self._parents_axis, self.spec.parents.items()), *(self._key_axis(key, keys) for key in keys))
        self.problems += [
            f"keys.{axis}: is the name of an axis in [parents] too" for axis in keys if axis in self.spec.parents
        ]
        if not self.problems:
            self._check_gap(axes)
        combinations = () if self.problems else self._combinations(axes, base)
        if self.problems:
            raise RecipeError(list(dict.fromkeys(self.problems)))  # an axis of many values repeats them
        return Plan(name, axes, self.spec.seeds, combinations, self.spec.gap)

    def _base(self) -> dict[str, Any]:
        try:
            return merge_parents(copy.deepcopy(self.spec.base), self.beside)
        except RecipeError as error:
            self.problems += [f"base: {problem}" for problem in error.problems]
            return {}

    def _parents_axis(self, item: tuple[str, Any]) -> Axis:
        name, values = item
        path = f"parents.{name}"
        lists = [[value] if isinstance(value, str) else value for value in self._check_values(path, values)]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            self.problems.append(f"{path}: expected names of recipes, or arrays of names, got {toml.value(values)}")
            return Axis(name, name, ())
        choices = zip(_labels(lists), lists, strict=True)
        return Axis(name, name, tuple(Choice(shown, self._merged(path, names)) for shown, names in choices))

    def _merged(self, path: str, names: list[str]) -> dict[str, Any]:
        try:
            return merge_parents({"extends": names}, self.beside)
        except RecipeError as error:
            self.problems += [f"{path}: {problem}" for problem in error.problems]
            return {}

    def _key_axis(self, key: str, keys: dict[str, Any]) -> Axis:
        if key == "seed":
            self.problems.append("keys.seed: give seeds = [...] at the top instead")
        values = self._check_values(f"keys.{key}", keys[key])
        return Axis(key, _column(key, list(keys)), tuple(Choice(_shown(value), value=value) for value in values))

    def _check_gap(self, axes: tuple[Axis, ...]) -> None:
        gap = self.spec.gap
        if gap is None:
            return
        shown = {axis.name: [choice.shown for choice in axis.choices] for axis in axes}
        if gap.axis not in shown:
            self.problems.append(
                f"gap.axis: there is no axis {gap.axis!r} in this file, but {', '.join(shown) or 'none'}"
            )
            return
        values = shown[gap.axis]
        self.problems += [
            f"gap.{end}: {value!r} is none of the values of {gap.axis}: {', '.join(map(str, values))}"
            for end, value in (("floor", gap.floor), ("ceiling", gap.ceiling))
            if value not in values
        ]
        if gap.floor == gap.ceiling:
            self.problems.append("gap: floor and ceiling are the same value; give two")

    def _check_values(self, path: str, values: Any) -> list[Any]:
        """The values, or none where they are not an array of distinct ones."""
        try:
            shown = toml.value(values)
        except TypeError as error:  # a date, which no key takes
            self.problems.append(f"{path}: {error}")
            return []
        if not isinstance(values, (list, tuple)):
            self.problems.append(f"{path}: expected an array of values, got {shown}")
            return []
        if not values:
            self.problems.append(f"{path}: is empty; give at least one value")
        twice = [text for text, count in Counter(map(toml.value, values)).items() if count > 1]
        self.problems += [f"{path}: holds {text} more than once" for text in twice]
        return list(values)

    def _combinations(self, axes: tuple[Axis, ...], base: dict[str, Any]) -> tuple[Combination, ...]:
        chosen = list(itertools.product(*(axis.choices for axis in axes)))
        slugs = [_slug(axes, choices) for choices in chosen]
        counts = Counter(slugs)
        return tuple(
            Combination(
                {axis.name: choice.shown for axis, choice in zip(axes, choices, strict=True)},
                self._applied(axes, choices, base),
                slug if counts[slug] == 1 else f"{slug}-{digest([choice.shown for choice in choices])[:6]}",
            )
            for choices, slug in zip(chosen, slugs, strict=True)
        )

    def _laid_over(self, data: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
        """A part over the base: what the file itself says stays, where the part says nothing else of it."""
        laid = lay_over(data, part)
        for section, own in self.spec.base.items():
            if section in part and _type(data.get(section)) == _type(part[section]):
                laid[section] = merge(own, laid[section])
        return laid

    def _applied(self, axes: tuple[Axis, ...], choices: tuple[Choice, ...], base: dict[str, Any]) -> dict[str, Any]:
        data = base
        for choice in choices:
            if choice.data is not None:
                data = self._laid_over(data, choice.data)
        data = copy.deepcopy(data)  # the parents' tables are shared by all combinations
        keyed = [(axis.name, choice.value) for axis, choice in zip(axes, choices, strict=True) if choice.data is None]
        problems = assign_all(data, (f"{key}={toml.value(value)}" for key, value in keyed))
        self.problems += [f"keys.{problem.removeprefix('--set ')}" for problem in problems]
        return data


def _type(content: Any) -> Any:
    """The type that a section states, if any."""
    return content.get("type") if isinstance(content, dict) else content


def _flat(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, whether the file quotes the dotted key or writes it as tables."""
    for name, item in table.items():
        dotted = f"{path}.{name}" if path else name
        if isinstance(item, dict):
            yield from _flat(item, dotted)
        else:
            yield dotted, item


def _labels(lists: list[list[str]]) -> list[str]:
    """The names without their folders, where that leaves them distinct."""
    short = [" + ".join(Path(name).stem for name in names) or "base" for names in lists]
    return short if len(set(short)) == len(short) else [" + ".join(names) or "base" for names in lists]


def _shown(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else toml.value(value)


def _column(key: str, keys: list[str]) -> str:
    """The last parts of a dotted key that tell it from the others: two at least, and no position in a list first."""
    parts = key.split(".")
    for count in range(2, len(parts)):
        tail = ".".join(parts[-count:])
        if not parts[-count].isdecimal() and sum(f".{other}".endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def _slug(axes: tuple[Axis, ...], choices: tuple[Choice, ...]) -> str:
    parts = [
        str(choice.shown) if choice.data is not None else f"{axis.column}={choice.shown}"
        for axis, choice in zip(axes, choices, strict=True)
    ]
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(parts))[:_SLUG] or "base"
