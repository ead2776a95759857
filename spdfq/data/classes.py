"""The order of classes: how names are numbered, and whether this is the order of a model's classes."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attrs import field, frozen

from spdfq.errors import DataError
from spdfq.teacher import Teacher

ClassOrder = str | tuple[str, ...] | None
_SYNSET = re.compile(r"n\d{8}(?!\d)")


def natural_order(names: Sequence[str]) -> list[str]:
    """Names in the order in which timm numbers class folders: ``c2`` before ``C10``; ties by characters."""
    return sorted(names, key=lambda name: (_parts(name), name))


def _parts(name: str) -> list[str | int]:
    """Text and numbers of a name in turn, without capital letters."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]


def numbered(found: Sequence[str], order: ClassOrder, place: str) -> list[str]:
    """Names of classes in the order of their numbers.

    Args:
        found: the names in a dataset.
        order: the names in the order of the model's classes, or the path of a text file with one of them on each line;
            ``None`` for the natural order.
        place: the start of an error message.

    Raises:
        DataError: the order cannot be read, repeats a name or lacks one of those found.
    """
    if order is None:
        return natural_order(found)
    where = f"{place}: class_order"
    names = list(order) if not isinstance(order, str) else _lines(Path(order), where)
    if not names:
        raise DataError(f"{where}: is empty; give the names in the order of the model's classes")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{where}: names {shortened(twice)} more than once; leave one of them")
    if lacking := natural_order(list(set(found) - set(names))):
        raise DataError(f"{where}: lacks {shortened(lacking)}; name every class at its place")
    return names


def _lines(path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise DataError(f"{where}: {path}: no such file; give an array of names, or a text file with one on each line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{where}: {path}: not a text file; write one name on each line") from None
    return [line.strip() for line in lines if line.strip()]


@frozen
class ModelClasses:
    """What timm knows about the classes of a model, in the order of its head.

    Args:
        title: of the list of classes, for messages.
        names: exact names: synsets of ImageNet, or those of the model's own configuration.
        descriptions: words for people, separated by commas; empty if there are none.
    """

    title: str
    names: Sequence[str]
    descriptions: Sequence[str] = ()
    by_name: dict[str, set[int]] = field(init=False)
    by_word: dict[str, set[int]] = field(init=False)

    @by_name.default
    def _by_name(self) -> dict[str, set[int]]:
        return _positions([name] for name in self.names)

    @by_word.default
    def _by_word(self) -> dict[str, set[int]]:
        return _positions([text, *text.split(",")] for text in self.descriptions)

    def shown(self, index: int) -> str:
        """The name of a class, with its first word."""
        words = f" ({self.descriptions[index].partition(',')[0]})" if self.descriptions else ""
        return f"{self.names[index]}{words}"


def _positions(lists: Iterable[Sequence[str]]) -> dict[str, set[int]]:
    """The positions at which each name occurs."""
    found: dict[str, set[int]] = {}
    for index, names in enumerate(lists):
        for name in names:
            found.setdefault(_plain(name), set()).add(index)
    return found


def model_classes(teacher: Teacher) -> ModelClasses | None:
    """The classes of a teacher from its own timm configuration, or those of the ImageNet with as many classes.

    ``None`` if timm knows no names.
    """
    from timm.data.imagenet_info import infer_imagenet_subset

    configured: dict[str, Any] = getattr(teacher.module, "pretrained_cfg", None) or {}
    names, described = configured.get("label_names"), configured.get("label_descriptions") or ()
    if isinstance(names, (list, tuple)) and len(names) == teacher.num_classes > 0:
        if isinstance(described, dict):
            described = [described.get(name, name) for name in names]
        complete = len(described) == len(names) and all(isinstance(text, str) for text in described)
        return ModelClasses("the model", names, described if complete else ())
    subset = infer_imagenet_subset({"num_classes": teacher.num_classes})
    return _imagenet(subset) if subset else None


@cache
def _imagenet(subset: str) -> ModelClasses:
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    descriptions = [info.index_to_description(index) for index in range(info.num_classes())]
    return ModelClasses(subset.replace("imagenet", "ImageNet"), info.label_names(), descriptions)


def _plain(name: str) -> str:
    """A name as it is compared: the synset it begins with, or its words without capital letters."""
    synset = _SYNSET.match(name)
    return synset[0] if synset else " ".join(re.split(r"[\s_/]+", name.lower().strip()))  # no folder is named a/b


@frozen
class Comparison:
    """What is wrong with the order of a dataset's classes.

    Args:
        problem: why the labels cannot be positions in the model's list of classes; empty if they can.
        doubt: why they may not be; empty if they are known to be, or the user has stated the order.
    """

    problem: str = ""
    doubt: str = ""


def compared(names: Sequence[str], teacher: Teacher, stated: bool, remedy: str) -> Comparison:
    """Compare the names of a dataset's classes with those of a model.

    Args:
        names: in the order of the labels.
        teacher: the model.
        stated: whether the user has stated this order. A different order is then a doubt and not a problem.
        remedy: how the user can state another order.
    """
    known = model_classes(teacher)
    if not names or known is None:
        return Comparison()
    named = [known.by_name.get(_plain(name), set()) for name in names]
    worded = [known.by_word.get(_plain(name), set()) for name in names]
    if 2 * sum(map(bool, named)) > len(names):
        if not stated and (problem := _not_the_same(names, known)):
            return Comparison(problem)
        return _ordered(names, named, known, teacher.name, stated, remedy)
    if 2 * sum(map(bool, worded)) > len(names):
        return _ordered(names, worded, known, teacher.name, stated, remedy)
    if stated or len(names) != teacher.num_classes:
        return Comparison()
    first = (
        f"class 0 is {names[0]} here and {known.shown(0)} there, class 1 is {names[1]} here and {known.shown(1)} there"
    )
    ids = "; numbers from 1 on are often ILSVRC's own, which are in another order" if names[0] == "1" else ""
    return Comparison(
        doubt=f"the classes are not named as those of {known.title}, so their order cannot be compared with the "
        f"model's: {first}{ids}; if that is wrong, or to say that it is right, {remedy}"
    )


def _not_the_same(names: Sequence[str], known: ModelClasses) -> str:
    """Which names are not a model's, and which of the model's are missing; empty if none."""
    plain = set(map(_plain, names))
    strange = [name for name in names if _plain(name) not in known.by_name]
    missing = [name for name in known.names if _plain(name) not in plain]
    lines = [f"holds {shortened(strange)} (not in {known.title})"] if strange else []
    lines += [f"lacks {shortened(missing)} of {known.title}'s classes"] if missing else []
    return f"{' and '.join(lines)}; a class without images is an empty folder" if lines else ""


def _ordered(
    names: Sequence[str], positions: Sequence[set[int]], known: ModelClasses, model: str, stated: bool, remedy: str
) -> Comparison:
    wrong = next((index for index, found in enumerate(positions) if found and index not in found), None)
    if wrong is None or wrong >= len(known.names):
        return Comparison()
    line = f"class {wrong} is {names[wrong]} here and {known.shown(wrong)} in {model}"
    if stated:
        return Comparison(doubt=f"class_order: {line}; leave class_order as it is only if the model's order is another")
    return Comparison(f"{line}; {remedy}")


def as_characters(names: Sequence[str]) -> str:
    """A line if natural order is not the order of characters, in which torchvision sorts folders; empty if it is."""
    pairs = enumerate(zip(natural_order(names), sorted(names), strict=True))
    index, here, there = next(((index, here, there) for index, (here, there) in pairs if here != there), (0, "", ""))
    if not here:
        return ""
    return (
        f"class {index} is {here} in natural order, and {there} in the order of characters, in which torchvision "
        "sorts; give class_order if the model was trained in that order, or to say that it was not"
    )


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """The first names as text, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def class_names(teacher: Teacher, dataset: Any = None) -> list[str]:
    """Names of a teacher's classes for people, in the order of its logits; empty if nobody knows them.

    They are the user's (``class_order``), otherwise timm's, unless the images' names are not those of timm, otherwise
    the names of the images' classes.

    Args:
        teacher: the model.
        dataset: labelled images with the same classes.
    """
    own = list(getattr(dataset, "label_names", ()))
    own = own if len(own) == teacher.num_classes else []
    known = None if teacher.headless else model_classes(teacher)
    if known is None or (own and (getattr(dataset, "class_order", None) or compared(own, teacher, False, "").doubt)):
        return own
    return list(known.descriptions or known.names)
