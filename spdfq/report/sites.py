"""Rows of the tables of sites: what was quantized, how, and what was left in float."""

from collections import Counter
from typing import Any

from attrs import frozen

Row = tuple[Any, ...]


@frozen
class SiteTables:
    """Tables of a ``sites.json``; a row has a value for each column.

    Args:
        quantized: site, kind, bits, quantizer, granularity and shape.
        quantized_counts: kind, quantizer, granularity, bits, and the number of such sites.
        floating: site, what it is, and its number of parameters.
        floating_counts: what they are, their number, and their parameters together.
        notes: what the steps could not change, a sentence each.
        multiplications: a sentence on the share of them that stays in float; empty if it is not known.
    """

    quantized: list[Row]
    quantized_counts: list[Row]
    floating: list[Row]
    floating_counts: list[Row]
    notes: list[str]
    multiplications: str


def site_tables(sites: dict[str, Any]) -> SiteTables:
    """The tables of the contents of a ``sites.json``.

    Raises:
        KeyError: a site lacks a value that every site has.
    """
    quantized, floating = sites.get("quantized", []), sites.get("float", [])
    return SiteTables(
        [
            (site["name"], site["kind"], site["bits"], site["quantizer"], site.get("granularity"), _shape(site))
            for site in quantized
        ],
        _quantized_counts(quantized),
        [(site["name"], site["what"], _grouped(site.get("parameters"))) for site in floating],
        _floating_counts(floating),
        sites.get("notes", []),
        _multiplications(sites.get("multiplications")),
    )


def _multiplications(counts: dict[str, Any] | None) -> str:
    if not counts:
        return ""
    share, total = f"{counts['percent_in_float']:.2f} %", f"{counts['total']:,}"
    return f"{share} of the {total} multiplications of a forward pass have an operand in float."


def _quantized_counts(sites: list[dict[str, Any]]) -> list[Row]:
    counts = Counter((site["kind"], site["quantizer"], site.get("granularity"), site["bits"]) for site in sites)
    kinds = [site["kind"] for site in sites]
    return [(*key, counts[key]) for key in sorted(counts, key=lambda key: (kinds.index(key[0]), key[-1]))]


def _floating_counts(sites: list[dict[str, Any]]) -> list[Row]:
    counts, parameters = Counter(site["what"] for site in sites), Counter[str]()
    for site in sites:
        parameters[site["what"]] += site.get("parameters") or 0
    return [(what, number, _grouped(parameters[what])) for what, number in counts.items()]


def _grouped(number: int | None) -> str:
    return f"{number:,}" if number else ""


def _shape(site: dict[str, Any]) -> str:
    return " × ".join(map(str, site.get("shape") or ()))
