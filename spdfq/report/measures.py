"""The quality measures of a run's images, for its page and for the command line's table."""

from typing import Any

from spdfq.report.markup import facts, section, text

MEASURES_FILE = "measures.json"

COLUMNS = (
    ("alignment", "semantic_alignment", "Semantic alignment"),
    ("heads", "head_similarity", "Head similarity"),
    ("prior", "prior_overlap", "Prior reached"),
    ("mean", "channel_mean", "Channel mean"),
    ("std", "channel_std", "Channel std"),
    ("slope", "spectrum_slope", "Spectrum slope"),
)
"""Heading of a table, key in ``measures.json``, and name on the page."""

_REST = (
    "Head similarity is the squared structural similarity of the raw attention maps of two heads of a block. Prior "
    "reached is the share of an attention prior's mass that attention has in common with it. The slope is the exponent "
    "of the radial power spectrum: 0 for white noise, about \N{MINUS SIGN}2 for photographs."
)


def shown(value: float | list[float] | None) -> str | None:
    """``0.44``; ``0.48 0.45 0.41``; nothing where there is no value."""
    if value is None:
        return None
    return " ".join(f"{number:.2f}" for number in (value if isinstance(value, list) else [value]))


def measures(found: dict[str, Any] | None) -> str:
    """The section of the page; nothing for a run that was not measured."""
    if found is None:
        return ""
    aligned = (
        "Alignment is the mean cosine of the features to the centroid of real images of the class that the model names "
        f"first ({found['real_images']} images of all classes). "
    )
    note = (aligned if found["real_images"] else "") + _REST
    rows = [(name, shown(found[key])) for _, key, name in COLUMNS]
    notes = "".join(f"<p>{text(line)}</p>" for line in found["notes"])
    return section("Measures", facts(rows), f"<p>{text(note)}</p>", notes)
