"""The Python page: signatures and docstrings of the public names, as Markdown."""

import inspect
import re
import textwrap
from importlib import import_module
from types import FunctionType
from typing import Any

import attrs

from spdfq.registry import REGISTRIES, datasets

# every public name of these packages is on the page, except registered components: those have the components page;
# datasets are on both, because spdfq.evaluate takes them
PACKAGES = (
    "spdfq",
    "spdfq.losses",
    "spdfq.losses.functional",
    "spdfq.synth",
    "spdfq.quantizers",
    "spdfq.quantized",
    "spdfq.backends",
    "spdfq.doctor",
    "spdfq.exporters",
    "spdfq.inference",
    "spdfq.calibration_data",
    "spdfq.data",
    "spdfq.teacher",
    "spdfq.recipe",
    "spdfq.trackers",
    "spdfq.report",
    "spdfq.runtime",
)
# of these modules, only the names listed are public
MODULES = {
    "spdfq.runs.pipeline": ("check", "evaluate_run"),
    "spdfq.runs.inspection": ("measure_runs",),
    "spdfq.runs.diagnosing": ("diagnose_run",),
    "spdfq.runs.exporting": ("export_run",),
    "spdfq.runs.evaluate_file": ("evaluate_file",),
    "spdfq.runs.predicting": ("load_run",),
    "spdfq.runs.calibration_images": ("export_images",),
    "spdfq.runs.card": ("card_run",),
    "spdfq.evaluation.accuracy": ("accuracy", "agreement", "logits_over"),
    "spdfq.evaluation.neighbours": ("nearest_neighbours", "similarity"),
    "spdfq.evaluation.measures": (
        "measure_images",
        "dataset_centroids",
        "semantic_alignment",
        "spectrum_slope",
        "channel_statistics",
        "prior_overlap",
    ),
    "spdfq.attention": ("record_attention", "AttentionRecord"),
    "spdfq.registry": ("Registry", "registry"),
    "spdfq.recipe.structure": ("component", "components", "component_list"),
    "spdfq.errors": ("SpdfqError", "RecipeError", "ComponentError", "ModelError", "DataError", "NonFiniteError"),
}
_WIDTH = 100
_SECTION = re.compile(r"(Args|Returns|Raises|Yields):")
_ENTRY = re.compile(r"([\w*, ]+): (.*)", re.DOTALL)


def api_block() -> str:
    """Every public name, grouped by the module it is imported from."""
    shown: dict[int, str] = {}
    parts = [_module(package, public_names(package), shown) for package in PACKAGES]
    parts += [_module(module, names, shown) for module, names in MODULES.items()]
    return "\n\n".join(parts)


def public_names(package: str) -> list[str]:
    """What a package exports: its ``__all__``, or the classes and functions that it imports."""
    module = import_module(package)
    every = getattr(module, "__all__", None)
    return sorted(
        every or [name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)]
    )


def _module(name: str, names: Any, shown: dict[int, str]) -> str:
    """The section of a module; ``shown`` says where each object is described already."""
    module = import_module(name)
    objects = {each: getattr(module, each) for each in names}
    kinds = [kind for kind in REGISTRIES.values() if kind is not datasets]
    registered = {id(entry.component) for kind in kinds for entry in map(kind.entry, kind.names())}
    components = [each for each, value in objects.items() if id(value) in registered]
    again = [each for each, value in objects.items() if id(value) in shown]
    parts = [f"## {name}", _markdown(inspect.getdoc(module) or "")]
    if components:
        listed = ", ".join(f"`{each}`" for each in components)
        parts.append(f"Components, described on the [components page](components.md): {listed}.")
    if again:
        listed = ", ".join(f"`{each}` (under `{shown[id(objects[each])]}`)" for each in again)
        parts.append(f"Also here: {listed}.")
    for each, value in objects.items():
        if each not in components and each not in again:
            shown[id(value)] = name
            parts.append(_entry(each, value))
    return "\n\n".join(part for part in parts if part)


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return f"### {name}\n\n```python\n{name} = {_annotation(value)}\n```"
    parts = [f"### {name}", _code(name, value) if _is_called(value) else "", _markdown(inspect.getdoc(value) or "")]
    if inspect.isclass(value) and not issubclass(value, Exception) and value not in _datasets():
        parts += [_member(name, each, member) for each, member in vars(value).items() if _is_member(each, member)]
    return "\n\n".join(part for part in parts if part)


def _datasets() -> list[type]:
    """The registered datasets; what they can do is described at their base class."""
    return [datasets.get(name) for name in datasets.names()]


def _is_called(value: Any) -> bool:
    """Whether the way to make or call it is part of the interface: of functions and of classes with fields."""
    return inspect.isfunction(value) or (attrs.has(value) and len(attrs.fields(value)) > 0)


def _is_member(name: str, member: Any) -> bool:
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    if not isinstance(function, FunctionType | property) or not function.__doc__:
        return False
    return name == "__call__" or not name.startswith("_")


def _member(owner: str, name: str, member: Any) -> str:
    if isinstance(member, property):
        title = f"**`{owner}.{name}`** (property)"
        return f"{title}\n\n{_markdown(inspect.getdoc(member) or '')}"
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    return f"**`{owner}.{name}`**\n\n{_code(name, function)}\n\n{_markdown(inspect.getdoc(function) or '')}"


def _code(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    parameters = [_parameter(each) for each in _with_markers(signature)]
    parameters = [each for each in parameters if each not in ("self", "cls")]
    ending = (
        ""
        if signature.return_annotation in (signature.empty, None) or inspect.isclass(value)
        else (f" -> {_annotation(signature.return_annotation)}")
    )
    line = f"{name}({', '.join(parameters)}){ending}"
    if len(line) > _WIDTH:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){ending}"
    return f"```python\n{line}\n```"


def _with_markers(signature: inspect.Signature) -> list[Any]:
    """The parameters, with ``*`` before the first that is given by name only."""
    found: list[Any] = list(signature.parameters.values())
    named = [index for index, each in enumerate(found) if each.kind is each.KEYWORD_ONLY]
    if named and not any(each.kind is each.VAR_POSITIONAL for each in found):
        found.insert(named[0], "*")
    return found


def _parameter(parameter: Any) -> str:
    if isinstance(parameter, str):
        return parameter
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}"
    return text


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z]\w*)", "", text).replace("NoneType", "None")


def _default(default: Any) -> str:
    """A default as source text; ``...`` where it is made by a factory or is an object without a short form."""
    if default is attrs.NOTHING or isinstance(default, attrs.Factory):
        return "..."
    if inspect.isfunction(default) or inspect.isclass(default):
        return default.__name__
    text = repr(default)
    return "..." if " at 0x" in text or len(text) > _WIDTH // 2 else text


def _markdown(doc: str) -> str:
    """A docstring in Markdown: sections become lists, double backticks single ones."""
    lines = doc.replace("``", "`").splitlines()
    parts, start = [], 0
    while start < len(lines):
        if heading := _SECTION.fullmatch(lines[start]):
            end = start + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
                end += 1
            parts.append(_section(heading[1], textwrap.dedent("\n".join(lines[start + 1 : end])).strip()))
        else:
            end = start + 1
            while end < len(lines) and not _SECTION.fullmatch(lines[end]):
                end += 1
            parts.append("\n".join(lines[start:end]).strip())
        start = end
    return "\n\n".join(part for part in parts if part)


def _section(heading: str, text: str) -> str:
    titles = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Yields": "Yields"}
    if heading in ("Returns", "Yields"):
        return f"{titles[heading]}: {text}"
    entries = re.split(r"\n(?=\S)", text)
    rows = []
    for entry in entries:
        entry = " ".join(entry.split())
        named = _ENTRY.fullmatch(entry)
        rows.append(f"* `{named[1]}`: {named[2]}" if named else f"* {entry}")
    return f"{titles[heading]}:\n\n" + "\n".join(rows)
