"""Rows of one combination with several seeds, and which of them can be compared."""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from attrs import define, field

from spdfq.bench.intervals import Difference, difference_over_seeds, paired_difference
from spdfq.bench.plan import Baseline, Gap
from spdfq.bench.rows import Row
from spdfq.errors import DataError, SpdfqError
from spdfq.evaluation.correctness import Hits, unpacked


@define(slots=False, eq=False)
class Group:
    """The finished rows of one combination, one for each seed.

    Args:
        label: for tables and messages.
        axes: the value of each axis; empty for runs outside a bench.
        rows: by seed, without failed ones.
        origin: the bench that they are from.
        folders: run folders that are still there.
    """

    label: str
    axes: dict[str, Any]
    rows: dict[int, Row]
    origin: str = ""
    folders: list[Path] = field(factory=list)

    @cached_property
    def hits(self) -> dict[int, Hits]:
        """Which images each seed classifies correctly, for the rows that have it: bool ``[images]``.

        Raises:
            DataError: what is stored is not that of as many images.
        """
        found = {}
        for seed, row in self.rows.items():
            metrics = row.measured
            if metrics.correct and metrics.correct.quantized is not None and metrics.test_images is not None:
                try:
                    found[seed] = unpacked(metrics.correct.quantized, metrics.images)
                except DataError as error:
                    raise DataError(f"{self.label}, seed {seed}: {error}; run it again") from None
        return found

    def top1(self, seeds: Iterable[int] | None = None) -> list[float]:
        """Top-1 of some or all seeds, in percent."""
        return [self.rows[seed].top1 for seed in (self.rows if seeds is None else seeds)]


def difference(own: Group, other: Group) -> Difference | None:
    """How much better one group is than another, over the seeds that both have; ``None`` if an interval is impossible.

    Rows without per-image results give an interval over the seeds only, for which two seeds are needed.

    Raises:
        SpdfqError: the groups quantize different models, or were measured on different test images.
    """
    check_comparable(own, other)
    seeds = [seed for seed in own.rows if seed in other.rows]
    with_hits = [seed for seed in seeds if seed in own.hits and seed in other.hits]
    if with_hits and len(with_hits) == len(seeds):
        return paired_difference(
            np.stack([own.hits[seed] for seed in seeds]), np.stack([other.hits[seed] for seed in seeds])
        )
    return difference_over_seeds(own.top1(seeds), other.top1(seeds)) if len(seeds) > 1 else None


def check_comparable(own: Group, other: Group) -> None:
    """Check that two groups quantize one model and were measured on the same images by the same measure.

    Raises:
        SpdfqError: they did not; or nothing says so, and what is known differs.
    """
    pair = f"{own.label} and {other.label}"
    for one in own.rows.values():
        for two in other.rows.values():
            mine, theirs = one.measured, two.measured
            if one.model.name != two.model.name or _differ(one.model.fingerprint, two.model.fingerprint):
                shown = f"{_named(one)} and {_named(two)}"
                raise SpdfqError(f"{pair}: quantize different models ({shown}); compare runs of one model")
            if mine.images != theirs.images or _differ(mine.test_images, theirs.test_images):
                shown = f"{_tested(one)} and {_tested(two)}"
                raise SpdfqError(
                    f"{pair}: were measured on different test images ({shown}); compare runs with one [evaluation]"
                )
            if _differ(mine.bank_images, theirs.bank_images):
                shown = f"{_bank(one)} and {_bank(two)}"
                raise SpdfqError(
                    f"{pair}: sought neighbours among different images ({shown}); compare runs with one [evaluation]"
                )
            alike = (mine.measure, mine.simulated) == (theirs.measure, theirs.simulated)
            if not alike or _differ(mine.precision, theirs.precision):
                raise SpdfqError(
                    f"{pair}: one is {_how(one)} and one {_how(two)}; compare runs that were measured alike"
                )


def closed(gap: Gap, groups: list[Group], group: Group) -> float | None:
    """The share of the gap that a group closes, over the seeds that it and both ends have; ``None`` without one.

    Raises:
        SpdfqError: the ends were measured on other images or quantize another model.
    """
    if group.axes.get(gap.axis) in (gap.floor, gap.ceiling):
        return None
    floor, ceiling = partner(groups, group, gap.axis, gap.floor), partner(groups, group, gap.axis, gap.ceiling)
    if floor is None or ceiling is None:
        return None
    check_comparable(group, floor)
    check_comparable(group, ceiling)
    seeds = [seed for seed in group.rows if seed in floor.rows and seed in ceiling.rows]
    if not seeds:
        return None
    low, own, high = (mean(each.top1(seeds)) for each in (floor, group, ceiling))
    return (own - low) / (high - low) if high > low else None


def partner(groups: list[Group], group: Group, axis: str, value: Any) -> Group | None:
    """The group with another value of one axis, and all else equal.

    A group of the same bench is preferred. One of another bench needs the same axes, and has to share the images or the
    back-end by their digests, because the benches may differ in what is on no axis.
    """
    wanted = {**group.axes, axis: value}
    found = [other for other in groups if axis in group.axes and other.axes == wanted]
    own = [other for other in found if other.origin == group.origin]
    return next(iter(own or [other for other in found if _one_part_differs(group, other)]), None)


def best(groups: list[Group], axis: str, references: tuple[Any, ...] = ()) -> list[Group]:
    """The groups that are better than every other one with the same values of the other axes, by the interval.

    Args:
        groups: of one or several benches.
        axis: along which groups are compared.
        references: values of the axis that are no candidates, such as real images.
    """
    candidates: dict[str, list[Group]] = {}
    for group in groups:
        if group.rows and axis in group.axes and group.axes[axis] not in references:
            rest = {name: value for name, value in group.axes.items() if name != axis}
            candidates.setdefault(repr(sorted(rest.items())), []).append(group)
    return [winner for alike in candidates.values() if (winner := _winner(alike)) is not None]


def over(groups: list[Group], baseline: Baseline, group: Group) -> Difference | None:
    """The difference to the group with the value of a baseline; ``None`` for that group itself, or without one."""
    if group.axes.get(baseline.axis) == baseline.value:
        return None
    other = partner(groups, group, baseline.axis, baseline.value)
    return difference(group, other) if other is not None and other.rows and group.rows else None


def deciding(groups: list[Group], of: Callable[[Group], Any]) -> list[str]:
    """The axes that decide a property of groups: those that alone change it somewhere."""
    found: dict[str, None] = {}
    for index, one in enumerate(groups):
        for two in groups[:index]:
            differing = [axis for axis in one.axes if one.axes[axis] != two.axes.get(axis)]
            if len(differing) == 1 and of(one) != of(two):
                found[differing[0]] = None
    return list(found)


def without_hits(groups: list[Group]) -> list[str]:
    """Labels of the groups in which rows have no per-image results."""
    return [group.label for group in groups if len(group.hits) < len(group.rows)]


def _winner(groups: list[Group]) -> Group | None:
    if len(groups) < 2:
        return None
    first = max(groups, key=lambda group: mean(group.top1()))
    try:
        rest = [difference(first, other) for other in groups if other is not first]
    except SpdfqError:  # rows that cannot be compared have no best one
        return None
    return first if all(each is not None and each.better for each in rest) else None


def _one_part_differs(group: Group, other: Group) -> bool:
    """Whether two groups share their images or their back-end, as far as is known."""
    one, two = (next(iter(each.rows.values())) for each in (group, other))
    known = None not in (one.images.digest, one.backend.digest)
    return known and (one.images.digest == two.images.digest or one.backend.digest == two.backend.digest)


def _differ(one: Any, two: Any) -> bool:
    return None not in (one, two) and one != two


def _named(row: Row) -> str:
    return f"{row.model.name} {(row.model.fingerprint or '')[:8]}".strip()


def _tested(row: Row) -> str:
    found = row.measured
    return f"{found.images} images {(found.test_images or '')[:8]}".strip()


def _bank(row: Row) -> str:
    found = row.measured
    return f"{found.bank} images {(found.bank_images or '')[:8]}".strip()


def _how(row: Row) -> str:
    found = row.measured
    how = "simulated" if found.simulated else "of an integer runtime"
    return f"{found.measure}, {how}{f', in {found.precision}' if found.precision else ''}"
