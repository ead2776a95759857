"""Recipes: TOML files that say which component does what; read strictly, merged, overridden and hashed."""

import hashlib
import json
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen, validators

from spdfq.errors import RecipeError
from spdfq.structure import component, component_list, structure, unstructure

SCHEMA = 1


@frozen(kw_only=True)
class ModelSpec:
    """The teacher: a timm name, or ``bundled:vit_fmnist``, or a timm architecture with a local checkpoint.

    Args:
        name: timm model name with its tag, or ``bundled:`` and the name of a bundled model.
        pretrained: take the weights timm knows from the hub (ignored for bundled models and local checkpoints).
        checkpoint: local safetensors weights instead of the hub's.
        num_classes: classes of the head, where they differ from the architecture's own.
        img_size: side of the input in pixels, where it differs from the model's own.
    """

    name: str
    pretrained: bool = True
    checkpoint: str | None = None
    num_classes: int | None = field(default=None, validator=validators.optional(validators.ge(2)))
    img_size: int | None = field(default=None, validator=validators.optional(validators.ge(8)))


@frozen(kw_only=True)
class Override:
    """Other settings for some sites.

    Args:
        sites: patterns over site names, as in a shell (``blocks.0.*``); one that matches nothing is an error.
        roles: ``first`` and ``last``: timm's own first convolution and classifier.
        bits: bit-width of every quantizer at the sites; 0 leaves them in float.
    """

    sites: tuple[str, ...] = ()
    roles: tuple[Literal["first", "last"], ...] = ()
    bits: int = field(validator=validators.in_((0, 2, 3, 4, 5, 6, 7, 8)))

    def __attrs_post_init__(self) -> None:
        if not self.sites and not self.roles:
            raise ValueError("names no site; give 'sites' (patterns) or 'roles' (first, last)")


@frozen(kw_only=True)
class Quantization:
    """What is quantized, how, and the steps that calibrate and repair it.

    Args:
        placement: which tensors are quantized.
        weights: quantizer of every weight.
        activations: quantizer of every activation that is not a softmax output.
        softmax: quantizer of attention probabilities.
        overrides: other bit-widths for some sites.
        steps: calibration, transforms and reconstruction, in order.
    """

    placement: Any = component("placement")
    weights: Any = component("quantizer")
    activations: Any = component("quantizer")
    softmax: Any = component("quantizer")
    overrides: tuple[Override, ...] = ()
    steps: tuple[Any, ...] = component_list("step")

    def __attrs_post_init__(self) -> None:
        if not self.steps:
            raise ValueError("has no steps; the first one is usually { type = 'calibrate' }")


@frozen(kw_only=True)
class Evaluation:
    """Where the accuracy is measured.

    Args:
        dataset: labelled images.
        batch: images per forward pass.
    """

    dataset: Any = component("dataset")
    batch: int = field(default=250, validator=validators.ge(1))


@frozen(kw_only=True)
class RuntimeSpec:
    """How a recipe runs; nothing here but the precision changes what is computed.

    Args:
        precision: of the teacher during synthesis; ``auto`` takes bfloat16 where the device is fast at it.
        device: ``auto`` takes an accelerator where there is one.
        threads: CPU threads; PyTorch's own choice where it is left out.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = field(default=None, validator=validators.optional(validators.ge(1)))


@frozen(kw_only=True)
class Recipe:
    """Everything a run depends on.

    Args:
        schema: version of the recipe format.
        seed: seed of every random draw.
        model: the teacher.
        synthesis: where the calibration images come from.
        quantization: the back-end.
        evaluation: the labelled images the accuracy is measured on.
        runtime: device and precision.
    """

    schema: int = field(default=SCHEMA)
    seed: int = field(default=0, validator=validators.ge(0))
    model: ModelSpec
    synthesis: Any = component("source")
    quantization: Quantization
    evaluation: Evaluation
    runtime: RuntimeSpec = field(factory=RuntimeSpec)

    @schema.validator
    def _known_schema(self, _: Any, value: int) -> None:
        if value != SCHEMA:
            raise ValueError(f"this version reads recipes of schema {SCHEMA}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data: every default written out."""
        return unstructure(self)

    def warnings(self) -> list[str]:
        """Combinations that run but are known to lose accuracy."""
        advice = getattr(self.synthesis, "advice", None)
        return [f"synthesis: {line}" for line in advice()] if advice else []


def load_recipe(
    source: "Recipe | str | Path | dict[str, Any]", overrides: Iterable[str] = (), seed: int | None = None
) -> Recipe:
    """Read, merge, override and check a recipe.

    Args:
        source: a `Recipe`, the name of a shipped recipe, the path of a ``.toml`` file, or plain data.
        overrides: ``dotted.key=value`` pairs, the value as TOML.
        seed: replaces the recipe's own seed.

    Raises:
        RecipeError: with every problem found, each on a line with its dotted path.
    """
    if isinstance(source, Recipe):
        source = source.to_dict()
    data = resolve(source, overrides, seed)
    problems: list[str] = []
    recipe = structure(Recipe, data, "", problems)
    if problems:
        raise RecipeError(problems)
    return recipe


def resolve(source: str | Path | dict[str, Any], overrides: Iterable[str] = (), seed: int | None = None) -> dict:
    """The merged plain data of a recipe, before it is checked."""
    data = merge_parents(dict(source), Path()) if isinstance(source, dict) else read(str(source))
    for assignment in overrides:
        assign(data, assignment)
    if seed is not None:
        data["seed"] = seed
    return data


def shipped() -> list[str]:
    """Names of the shipped recipes and parts, for example ``quickstart`` and ``images/spdfq``."""
    root = Path(str(files("spdfq.recipes")))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml"))


def locate(name: str, beside: Path = Path()) -> Path:
    """The file of a recipe: a path where the name ends in ``.toml``, a shipped recipe otherwise."""
    if name.endswith(".toml"):
        path = beside / name
        if not path.is_file():
            raise RecipeError([f"{name}: no such file; to run a shipped recipe leave out '.toml'"])
        return path
    if name not in shipped():
        import difflib

        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        top = ", ".join(known for known in shipped() if "/" not in known)
        raise RecipeError([f"{name}: no shipped recipe of that name{hint} (shipped: {top}; a file ends in .toml)"])
    return Path(str(files("spdfq.recipes"))) / f"{name}.toml"


def read(name: str, beside: Path = Path(), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged plain data of a recipe file and all it extends."""
    path = locate(name, beside)
    if path.resolve() in chain:
        raise RecipeError([f"{name}: extends itself by way of {' -> '.join(p.stem for p in chain)}"])
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: not valid TOML: {error}"]) from None
    return merge_parents(data, path.parent, (*chain, path.resolve()))


def merge_parents(data: dict[str, Any], beside: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge the parents named under ``extends`` from left to right, then the data itself."""
    parents = data.pop("extends", [])
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise RecipeError([f"extends: expected an array of recipe names, got {parents!r}"])
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read(parent, beside, chain))
    return merge(merged, data)


def merge(parent: Any, child: Any) -> Any:
    """Tables merge key by key; a table of another ``type``, a list or a value replaces its parent's."""
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return child
    if "type" in child and child["type"] != parent.get("type", child["type"]):
        return child
    return {**parent, **{key: merge(parent.get(key), value) for key, value in child.items()}}


def assign(data: dict[str, Any], assignment: str) -> None:
    """Carry out ``dotted.key=value`` on the merged data; whether the key exists is checked with the whole recipe."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise RecipeError([f"--set {assignment}: expected key=value, for example quantization.weights.bits=3"])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise RecipeError(
            [f"--set {assignment}: the value is not TOML; strings need quotes: '{key}=\"{text}\"'"]
        ) from None
    *parents, last = key.strip().split(".")
    table: Any = data
    for part in parents:
        table = _descend(table, part, key)
    if isinstance(table, list):
        table[_index(table, last, key)] = value
    else:
        table[last] = value


def _descend(table: Any, part: str, key: str) -> Any:
    slot: Any = _index(table, part, key) if isinstance(table, list) else part
    inner = table[slot] if isinstance(table, list) else table.setdefault(slot, {})
    if isinstance(inner, str):  # the shorthand for a component without options
        inner = table[slot] = {"type": inner}
    if not isinstance(inner, (dict, list)):
        raise RecipeError([f"--set {key}: {part!r} is a value, it has no keys"])
    return inner


def _index(table: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(table):
        raise RecipeError([f"--set {key}: {part!r} is not a position of this list (0 to {len(table) - 1})"])
    return int(part)


def digest(*parts: Any) -> str:
    """A short stable hash of plain data."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]
