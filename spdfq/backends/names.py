"""Names in a line of notes."""

from collections.abc import Sequence

_SHOWN = 3


def some_of(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
