"""Parts: one or more sections of a recipe, for functions that need no whole recipe."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import evolve, field, fields, frozen, validators

from spdfq.errors import RecipeError
from spdfq.recipe.files import listed
from spdfq.recipe.schema import (
    SCHEMA,
    Evaluation,
    ModelSpec,
    Published,
    Quantization,
    Recipe,
    RuntimeSpec,
    given_data,
    student_problems,
)
from spdfq.recipe.structure import component, components, structure, unstructure

_EXAMPLES = {"synthesis": "images/spdfq", "quantization": "backends/repq", "evaluation": "evaluation/imagenet"}
# a table with one of these keys is a section, not a table of sections
_KEYS_OF = {
    "synthesis": {"type"},
    "quantization": {each.name for each in fields(Quantization)},
    "evaluation": {each.name for each in fields(Evaluation)},
}


@frozen(kw_only=True)
class Part:
    """Sections of a recipe, with the fields of `Recipe`; ``None`` for a section that is not given."""

    schema: int = field(default=SCHEMA, validator=validators.in_((SCHEMA,)))
    seed: int = field(default=0, validator=validators.ge(0))
    model: ModelSpec | None = None
    synthesis: Any = component("source", default=None)
    controls: dict[str, Any] = components("source")
    quantization: Quantization | None = None
    evaluation: Evaluation | None = None
    runtime: RuntimeSpec = field(factory=RuntimeSpec)
    published: Published | None = None


def load_part(source: Any, wanted: str, overrides: Iterable[str] = (), seed: int | None = None) -> Part:
    """Read and check sections of a recipe.

    Args:
        source: a `Recipe`, the name of a shipped recipe or part, the path of a ``.toml`` file, plain data (a table of
            sections, or one section), or a section: a source of images, a `Quantization` or an `Evaluation`.
        wanted: the section that must be there: ``synthesis``, ``quantization`` or ``evaluation``.
        overrides: ``dotted.key=value`` pairs, with the keys of a whole recipe.
        seed: replaces the seed in the data.

    Raises:
        RecipeError: with every problem found.
    """
    overrides = listed(overrides)
    section = _built_section(source)
    if section and not overrides:  # used as it is, so that its components need not be registered
        part = evolve(_checked({} if seed is None else {"seed": seed}), **{section: source})
    else:
        part = _checked(given_data(_as_data(source, section), overrides, seed))
    if getattr(part, wanted) is None:
        name = source if isinstance(source, (str, Path)) else "recipe"
        held = ", ".join(key for key in ("model", *_KEYS_OF) if getattr(part, key) is not None)
        raise RecipeError(
            [f"{name}: has no {wanted} section, only {held or 'others'}; give one such as {_EXAMPLES[wanted]!r}"]
        )
    return part


def _built_section(source: Any) -> str | None:
    """The name of the section that an object is."""
    if isinstance(source, (Quantization, Evaluation)):
        return type(source).__name__.lower()
    return "synthesis" if hasattr(source, "synthesize") and not isinstance(source, type) else None


def _as_data(source: Any, section: str | None) -> Any:
    """A source of sections as a name, a path or a table of sections."""
    if isinstance(source, Recipe):
        return source.to_dict()
    if section:
        return {section: unstructure(source, "source" if section == "synthesis" else None)}
    if isinstance(source, dict):
        alone = next((name for name, keys in _KEYS_OF.items() if keys & source.keys()), None)
        return {alone: source} if alone else source
    return source


def _checked(data: dict[str, Any]) -> Part:
    problems: list[str] = []
    part: Part = structure(Part, data, "", problems)
    if not problems and part.synthesis is not None and part.quantization is not None:
        problems = student_problems([("synthesis", part.synthesis)], part.quantization)
    if problems:
        raise RecipeError(problems)
    return part
