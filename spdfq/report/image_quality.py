"""The quality measures of a run's images, as the page and the command line's table show them."""

from typing import Any

MEASURES_FILE = "measures.json"

COLUMNS = (
    ("alignment", "semantic_alignment", "Semantic alignment"),
    ("heads", "head_similarity", "Head similarity"),
    ("prior", "prior_overlap", "Prior reached"),
    ("mean", "channel_mean", "Channel mean"),
    ("std", "channel_std", "Channel std"),
    ("slope", "spectrum_slope", "Spectrum slope"),
)
"""Heading in a table, key in ``measures.json``, and name on the page."""


def two_decimals(value: float | list[float] | None) -> str | None:
    """``0.44``; ``0.48 0.45 0.41``; ``None`` without a value."""
    if value is None:
        return None
    return " ".join(f"{number:.2f}" for number in (value if isinstance(value, list) else [value]))


def quality_section(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a ``measures.json``.

    Raises:
        KeyError: the file lacks a measure.
    """
    values = {name: two_decimals(found[key]) for _, key, name in COLUMNS}
    return {
        "facts": {name: value for name, value in values.items() if value is not None},
        "real_images": found["real_images"],
        "notes": list(found["notes"]),
    }
