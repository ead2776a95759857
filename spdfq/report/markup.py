"""Small pieces of HTML: everything that comes from a run is escaped here."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def text(value: Any) -> str:
    """A value as escaped text; nothing for ``None``."""
    return "" if value is None else escape(str(value))


def section(title: str, *content: str) -> str:
    """A part of the page under its heading; nothing where it would be empty."""
    body = "\n".join(part for part in content if part)
    return f"<section><h2>{text(title)}</h2><div>\n{body}\n</div></section>" if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in a box of its own that scrolls; a column whose name ends in ``#`` holds numbers."""
    kinds = [' class="number"' if column.endswith("#") else "" for column in columns]
    heads = "".join(f"<th{kind}>{text(column.rstrip('#'))}</th>" for kind, column in zip(kinds, columns, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return box(f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>")


def box(content: str, kind: str = "") -> str:
    """A box that scrolls by itself, also from the keyboard, when its content is too wide or too long."""
    return f'<div class="{f"box {kind}".strip()}" tabindex="0">{content}</div>'


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values without those that are ``None``."""
    known = [(name, value) for name, value in pairs if value is not None]
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in known)
    return f"<dl>{items}</dl>" if items else ""


def folded(summary: str, content: str) -> str:
    """Content that is shown when its line is opened."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def picture(path: Path, kind: str, description: str, caption: str) -> str:
    """A PNG file as a figure that carries its bytes; nothing where there is no such file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{text(description)}">'
    return f"<figure>{box(image, kind)}<figcaption>{text(caption)}</figcaption></figure>"


def percent(value: float | None) -> str | None:
    """``89.9 %``."""
    return None if value is None else f"{value:.1f} %"


def seconds(value: float) -> str:
    """``4.2 s``, ``87 s``, ``12 min 05 s``."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"
