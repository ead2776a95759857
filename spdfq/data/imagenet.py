"""ImageNet-1k's classes: timm's models know them as its 1,000 WordNet synsets in alphabetical order."""

from collections.abc import Sequence
from functools import cache

from spdfq.data.base import shortened


@cache
def synsets() -> dict[str, int]:
    """The position of each synset (``n01440764`` is 0) in the classes of an ImageNet-1k model."""
    from timm.data import ImageNetInfo

    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def difference(names: Sequence[str], num_classes: int) -> str:
    """How folders that are mostly ImageNet-1k's differ from them; empty where they do not, or are something else.

    Args:
        names: of the folders.
        num_classes: of the model; other than 1,000 it is none of ImageNet-1k.
    """
    if num_classes != len(synsets()):
        return ""
    strange = sorted(set(names) - synsets().keys())
    missing = sorted(synsets().keys() - set(names))
    if len(strange) * 2 >= len(names) or not (strange or missing):
        return ""
    lines = [f"holds {shortened(strange)}, no class of ImageNet-1k"] if strange else []
    return " and ".join(lines + ([f"lacks {shortened(missing)} of ImageNet-1k's classes"] if missing else []))
