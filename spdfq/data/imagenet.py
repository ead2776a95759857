"""The classes of ImageNet-1k: 1,000 WordNet synsets, which timm's models number in alphabetical order."""

from collections.abc import Sequence
from functools import cache

from spdfq.data.base import shortened


@cache
def synsets() -> dict[str, int]:
    """The class number of each synset in an ImageNet-1k model (``n01440764`` is 0)."""
    from timm.data import ImageNetInfo

    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def imagenet_difference(names: Sequence[str], num_classes: int) -> str:
    """How class folders differ from those of ImageNet-1k, as text.

    Args:
        names: names of the folders.
        num_classes: number of classes of the model.

    Returns:
        Empty text if they do not differ, if at least half of the names are not synsets of ImageNet-1k, or if the model
        does not have 1,000 classes.
    """
    if num_classes != len(synsets()):
        return ""
    strange = sorted(set(names) - synsets().keys())
    missing = sorted(synsets().keys() - set(names))
    if len(strange) * 2 >= len(names) or not (strange or missing):
        return ""
    lines = [f"holds {shortened(strange)} (not in ImageNet-1k)"] if strange else []
    return " and ".join(lines + ([f"lacks {shortened(missing)} of ImageNet-1k's classes"] if missing else []))
