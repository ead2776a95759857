"""Tables of what was quantized, how, and of what was left in float."""

from collections import defaultdict
from typing import Any

from spdfq.report.markup import folded, section, table, text


def site_tables(sites: dict[str, list[Any]]) -> str:
    """The section of a ``sites.json``: counts first, every site in a list that opens."""
    quantized, left = sites.get("quantized", []), sites.get("float", [])
    return section(
        "Sites",
        _quantized(quantized) if quantized else "",
        _left_in_float(left) if left else "",
        _notes(sites.get("notes", [])),
    )


def _quantized(sites: list[dict[str, Any]]) -> str:
    counts: dict[tuple[Any, ...], int] = defaultdict(int)
    for site in sites:
        counts[tuple(site.get(key) for key in ("kind", "quantizer", "granularity", "bits"))] += 1
    kinds = [site["kind"] for site in sites]
    order = sorted(counts, key=lambda key: (kinds.index(key[0]), key[-1]))
    columns = ["kind", "quantizer", "granularity", "bits#", "sites#"]
    summary = table(columns, ((*key, counts[key]) for key in order))
    rows = [
        (site["name"], site["kind"], site["bits"], site["quantizer"], site.get("granularity"), _shape(site))
        for site in sites
    ]
    every = table(["site", "kind", "bits#", "quantizer", "granularity", "shape"], rows)
    return f"<h3>Quantized</h3>{summary}{folded(f'All {len(sites)} quantized sites', every)}"


def _left_in_float(sites: list[dict[str, Any]]) -> str:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for site in sites:
        counts[site["what"]][0] += 1
        counts[site["what"]][1] += site.get("parameters") or 0
    rows = [(what, number, _grouped(parameters)) for what, (number, parameters) in counts.items()]
    names = [(site["name"], site["what"], _grouped(site.get("parameters"))) for site in sites]
    every = table(["site", "what", "parameters#"], names)
    summary = table(["what", "sites#", "parameters#"], rows)
    return f"<h3>Left in float</h3>{summary}{folded(f'All {len(sites)} sites in float', every)}"


def _notes(notes: list[str]) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f"<h3>What the steps left as it was</h3><ul>{items}</ul>" if notes else ""


def _grouped(number: int | None) -> str:
    return f"{number:,}" if number else ""


def _shape(site: dict[str, Any]) -> str:
    return " × ".join(map(str, site.get("shape") or ()))
