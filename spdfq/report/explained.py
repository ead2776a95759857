"""Explanations of the names on the page, which it shows on hover or tap."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from markupsafe import Markup, escape

from spdfq.errors import reading
from spdfq.report.json_file import read_json
from spdfq.report.terms import STAGES, TERMS

EXPLAINED_FILE = "explained.json"
_TABLE = re.compile(r"\[(\[?)([^\[\]]+)\]?\]")
_KEY = re.compile(r"([\w-]+|\"[^\"]*\") = ")

_LABEL = re.compile(r"W(\d+)A(\d+)")


@frozen
class Note:
    """An explanation in the page.

    Args:
        id: of its element.
        name: what is explained.
        text: the explanation.
    """

    id: str
    name: str
    text: str


@define
class Explained:
    """Marks up the names that have an explanation, and keeps those that the page needs.

    Args:
        names: of components, with their explanations.
        keys: of the recipe by dotted path, with their explanations.
    """

    names: dict[str, str] = field(factory=dict)
    keys: dict[str, str] = field(factory=dict)
    used: dict[str, Note] = field(factory=dict, init=False)

    @classmethod
    def of(cls, folder: Path) -> "Explained":
        """Those of a run folder; without its file, the general terms only.

        Raises:
            DataError: the file is damaged.
        """
        path = folder / EXPLAINED_FILE
        if not path.is_file():
            return cls()
        with reading(path):
            found = read_json(path)
            return cls(_texts(found["names"]), _texts(found["keys"]))

    def name(self, text: object) -> Markup:
        """A text in which the whole, or each part between commas, opens its explanation."""
        whole = str(text)
        parts = [whole] if self._about(whole) else whole.split(", ")
        return Markup(", ").join(self._button(part, self._about(part)) for part in parts)

    def stage(self, name: str) -> Markup:
        """The name of a stage, after that of its control if it has one."""
        control, colon, stage = name.rpartition(": ")
        return escape(control + colon) + self._button(stage, STAGES.get(stage))

    def recipe(self, lines: list[str]) -> Iterator[Markup]:
        """The lines of a recipe: the heading of a table opens the meaning of its keys, and a key shows its own."""
        path, seen = "", dict[str, int]()
        for line in lines:
            if head := _TABLE.fullmatch(line.strip()):
                path = head[2]
                if head[1]:
                    seen[path] = seen.get(path, -1) + 1
                    path = f"{path}.{seen[path]}"
                yield self._table(line, path)
            elif (key := _KEY.match(line)) and (about := self.keys.get(f"{path}.{key[1]}".lstrip("."))):
                end = len(key[1])
                yield Markup('<span class="key-name" title="{}">{}</span>{}').format(about, line[:end], line[end:])
            else:
                yield escape(line)

    def _table(self, line: str, path: str) -> Markup:
        inside = {key[len(path) + 1 :]: about for key, about in self.keys.items() if key.startswith(f"{path}.")}
        if not inside:
            return Markup("<b>{}</b>").format(line)
        text = "\n".join(f"{key}: {about}" for key, about in inside.items())
        note = self.used.setdefault(f"[{path}]", Note(f"term{len(self.used)}", line, text))
        return Markup('<button class="term table" popovertarget="{}">{}</button>').format(note.id, line)

    def _about(self, name: str) -> str | None:
        if (about := self.names.get(name) or TERMS.get(name) or TERMS.get(name[:1].lower() + name[1:])) is not None:
            return about
        if label := _LABEL.match(name):
            return (
                f"{label[1]} bits for weights and {label[2]} bits for activations. The first and last layer may have "
                "more: see the section on sites."
            )
        return None

    def _button(self, name: str, about: str | None) -> Markup:
        if about is None:
            return escape(name)
        note = self.used.setdefault(about, Note(f"term{len(self.used)}", name, about))
        return Markup('<button class="term" popovertarget="{}" title="{}">{}</button>').format(note.id, about, name)


def _texts(table: Any) -> dict[str, str]:
    return {name: str(text) for name, text in table.items()}
