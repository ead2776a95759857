"""Attrs validators for the options of quantizers and observers."""

from typing import Any

from attrs import Attribute


def check_bits(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts 2 to 8: a code fits into one byte, and there are values on both sides of zero."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
        raise ValueError(f"{attribute.name} must be a whole number from 2 to 8, not {value!r}")


def check_granularity(_: Any, attribute: "Attribute[str]", value: str) -> None:
    """Accepts the names of what shares one scale."""
    if value not in ("tensor", "channel"):
        raise ValueError(f'{attribute.name} must be "tensor" or "channel", not {value!r}')


def check_flag(_: Any, attribute: "Attribute[bool]", value: bool) -> None:
    """Accepts true and false."""
    if not isinstance(value, bool):
        raise ValueError(f"{attribute.name} must be true or false, not {value!r}")


def check_axis(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts an axis, counted from either end."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{attribute.name} must be a whole number such as 0 or -1, not {value!r}")


def check_count(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts a number of candidates of a search."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise ValueError(f"{attribute.name} must be a whole number of candidates, 2 or more, not {value!r}")


def check_smallest_factor(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Accepts a share of the observed range."""
    if not 0 < value < 1:
        raise ValueError(f"{attribute.name} must lie between 0 and 1, a share of the observed range, not {value!r}")
