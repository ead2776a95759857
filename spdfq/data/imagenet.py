"""The classes of ImageNet-1k: 1,000 WordNet synsets, which timm's models number in alphabetical order."""

from functools import cache


@cache
def synsets() -> dict[str, int]:
    """The class number of each synset in an ImageNet-1k model (``n01440764`` is 0)."""
    from timm.data import ImageNetInfo

    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
