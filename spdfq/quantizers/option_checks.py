"""Attrs validators for the options of quantizers and observers."""

from typing import Any

from attrs import Attribute

BYTE = 8
"""The most bits of a code that fits into one byte."""
WIDE = 16
"""The bits of a code of two bytes."""


def check_bits(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts 2 to 8: a code fits into one byte, and there are values on both sides of zero."""
    if not 2 <= value <= BYTE:
        remedy = "; only the quantizer 'uniform' takes 16" if value == WIDE else ""
        raise ValueError(f"{attribute.name} must be a whole number from 2 to 8, not {value!r}{remedy}")


def check_wide_bits(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts 2 to 8, and 16."""
    if not 2 <= value <= BYTE and value != WIDE:
        raise ValueError(f"{attribute.name} must be a whole number from 2 to 8, or 16 for activations, not {value!r}")


def check_count(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Accepts a number of candidates of a search."""
    if value < 2:
        raise ValueError(f"{attribute.name} must be a whole number of candidates, 2 or more, not {value!r}")


def check_smallest_factor(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Accepts a share of the observed range."""
    if not 0 < value < 1:
        raise ValueError(f"{attribute.name} must lie between 0 and 1, a share of the observed range, not {value!r}")
