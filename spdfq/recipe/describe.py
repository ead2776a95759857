"""Descriptions of components and recipes, in recipe terms, for the command line and the generated docs."""

import inspect
import itertools
import re
import textwrap
import types
import typing
from typing import Any

import attrs

from spdfq.recipe import locate, toml
from spdfq.recipe.structure import unstructure
from spdfq.registry import first_paragraph, registry

_NOUNS = {bool: "true or false", int: "whole number", float: "number", str: "string", dict: "table"}
_ARGUMENT = re.compile(r"(\w+): (.*)")
_SENTENCE = re.compile(r".*?\.(?=\s|$)|.*")


@attrs.frozen
class FieldDoc:
    """One key of a component or section.

    Args:
        name: the key.
        type: the type of its value, in recipe terms.
        default: its default as TOML, ``required`` or ``none``.
        doc: its meaning, from the docstring.
    """

    name: str
    type: str
    default: str
    doc: str


def describe(cls: type) -> list[FieldDoc]:
    """The keys of a component or section, in order."""
    hints, docs = typing.get_type_hints(cls), _documented(cls)
    return [
        FieldDoc(field.name, _type(field, hints[field.name]), _default(field), docs.get(field.name, ""))
        for field in keys(cls)
    ]


def table_of(cls: type, name: str) -> type | None:
    """The class of a key whose value is a table but not a component; ``None`` for any other key."""
    hint = typing.get_type_hints(cls)[name]
    return next((choice for choice in (typing.get_args(hint) or (hint,)) if attrs.has(choice)), None)


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return plain(first_paragraph(cls))


def body(cls: type) -> str:
    """A class's docstring without its first paragraph and its ``Args:``, and a quantizer's line on integer runtimes."""
    before, _, after = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[2].partition("Args:\n")
    integers = f"Integer runtime: {cls.integers}." if hasattr(cls, "integers") else ""
    return plain("\n\n".join(part.strip() for part in (before, after.partition("\n\n")[2], integers) if part.strip()))


def recipe_summary(name: str) -> str:
    """The first sentence of the comment that a shipped recipe starts with."""
    lines = locate(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return _SENTENCE.findall(comment)[0]


def plain(text: str) -> str:
    """Text without the double backticks of reStructuredText."""
    return text.replace("``", "`")


def arguments(doc: str) -> dict[str, str]:
    """The ``Args:`` section of a docstring, as one line for each name."""
    found: dict[str, str] = {}
    section = textwrap.dedent(inspect.cleandoc(doc).partition("Args:\n")[2].partition("\n\n")[0])
    for line in section.splitlines():
        named = _ARGUMENT.fullmatch(line)
        if named:
            found[named[1]] = plain(named[2])
        elif found and line.startswith(" "):
            found[next(reversed(found))] += " " + plain(line.strip())
        else:
            break
    return found


def keys(cls: type) -> list[attrs.Attribute]:
    """The attrs fields that a recipe can set."""
    return [field for field in attrs.fields(cls) if field.init]


def _documented(cls: type) -> dict[str, str]:
    """The documentation of each argument, from the class or the nearest parent class that has it."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        docs |= arguments(parent.__doc__ or "") if attrs.has(parent) else {}
    return docs


def _type(field: attrs.Attribute, hint: Any) -> str:
    kind, many = field.metadata.get("kind"), field.metadata.get("many")
    if many is dict:
        return f"table of {kind} tables"
    return f"array of {kind} tables" if many else kind or _hint(hint)


def _hint(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(toml.value, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_hint(choice) for choice in inner if choice is not type(None))
    if origin is tuple:
        return f"[{', '.join('...' if item is Ellipsis else _hint(item) for item in inner)}]"
    if attrs.has(hint):
        return f"table with {', '.join(field.name for field in keys(hint))}"
    return _NOUNS.get(hint, hint.__name__)


def _default(field: attrs.Attribute) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    made_by = getattr(field.default, "factory", None)
    default = made_by() if made_by else field.default
    if default is None:
        return "none"
    kind = field.metadata.get("kind")
    if kind and not field.metadata.get("many"):
        return toml.value(registry(kind).name_of(type(default)))
    return toml.value(unstructure(default))
