"""Recipes: which component does what, checked strictly before anything runs."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen, validators

from spdfq.errors import RecipeError
from spdfq.recipe.files import resolve, shipped, whole
from spdfq.recipe.structure import component, component_list, components, structure, unstructure

SCHEMA = 1


def _none_or_several(_: Any, __: Any, value: int | None) -> None:
    if value is not None and value != 0 and value < 2:
        raise ValueError(f"must be at least 2, or 0 for the model without its head, got {value}")


def _sides(_: Any, __: Any, value: int | tuple[int, int] | None) -> None:
    sides = () if value is None else (value,) if isinstance(value, int) else value
    if any(side < 8 for side in sides):
        raise ValueError(f"must be at least 8 pixels, got {value if isinstance(value, int) else list(sides)}")


@frozen(kw_only=True)
class ModelSpec:
    """The teacher: a timm name, or ``bundled:vit_fmnist``, or a timm architecture with a local checkpoint.

    Args:
        name: timm model name with its tag, or ``bundled:`` and the name of a bundled model.
        pretrained: take the weights timm knows from the hub (ignored for bundled models and local checkpoints).
        checkpoint: local safetensors weights instead of the hub's.
        num_classes: classes of the head, where they differ from the architecture's own; 0 for none.
        img_size: side of the input in pixels, or ``[height, width]``, where it differs from the model's own.
    """

    name: str
    pretrained: bool = True
    checkpoint: str | None = None
    num_classes: int | None = field(default=None, validator=_none_or_several)
    img_size: int | tuple[int, int] | None = field(default=None, validator=_sides)

    @property
    def bundled(self) -> bool:
        """Whether the weights come with this library."""
        return self.name.startswith("bundled:")

    @property
    def random(self) -> bool:
        """Whether nothing gives the model trained weights."""
        return not (self.pretrained or self.checkpoint or self.bundled)


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
class Budget:
    """What the bits of all sites may come to; which site gets how many is measured on the images.

    Sites that an override names keep its bits, and count.

    Args:
        weights: mean bits of a quantized weight (the size of the model); activations keep their bits.
        operations: mean, over all multiplications of two quantized numbers, of the product of their bits: W4A4 is 16.
        choices: bit-widths that a site may get.
        images: how many of the images the sensitivity of the sites is measured on.
    """

    weights: float | None = field(default=None, validator=validators.optional(validators.gt(0.0)))
    operations: float | None = field(default=None, validator=validators.optional(validators.gt(0.0)))
    choices: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8))
    images: int = field(default=16, validator=validators.ge(1))

    @choices.validator
    def _widths(self, _: Any, value: tuple[int, ...]) -> None:
        if not value or any(bits not in range(2, 9) for bits in value) or len(set(value)) < len(value):
            raise ValueError(f"choices must be different whole numbers from 2 to 8, not {list(value)}")

    def __attrs_post_init__(self) -> None:
        if (self.weights is None) == (self.operations is None):
            raise ValueError("give one of 'weights' (mean bits) and 'operations' (mean product of bits)")


@frozen(kw_only=True)
class Quantization:
    """What is quantized, how, and the steps that calibrate and repair it.

    Args:
        placement: which tensors are quantized.
        weights: quantizer of every weight.
        activations: quantizer of every activation that is not a softmax output.
        softmax: quantizer of attention probabilities.
        gelu: quantizer of GELU outputs, where it is not that of the other activations.
        overrides: other bit-widths for some sites.
        budget: bit-widths by a budget; without it every site has those of its quantizer.
        steps: calibration, transforms and reconstruction, in order.
    """

    placement: Any = component("placement")
    weights: Any = component("quantizer")
    activations: Any = component("quantizer")
    softmax: Any = component("quantizer")
    gelu: Any = component("quantizer", default=None)
    overrides: tuple[Override, ...] = ()
    budget: Budget | None = None
    steps: tuple[Any, ...] = component_list("step")

    def __attrs_post_init__(self) -> None:
        if not self.steps:
            raise ValueError("has no steps; the first one is usually { type = 'calibrate' }")

    @property
    def label(self) -> str:
        """The bits in short: ``W4A4``; ``W4.0A4`` where each weight has its own, ``16.0 BOP`` where activations too.

        A32 where the placement leaves activations in float.
        """
        if self.budget and self.budget.operations:
            return f"{self.budget.operations} BOP"
        weights = self.budget.weights if self.budget else self.weights.bits
        return f"W{weights}A{self.activations.bits if self.placement.kinds - {'weight'} else 32}"


@frozen(kw_only=True)
class Evaluation:
    """Where the accuracy is measured.

    Args:
        dataset: labelled images.
        bank: other labelled images, whose features a model without a head is judged by; its nearest neighbours vote.
        batch: images per forward pass.
    """

    dataset: Any = component("dataset")
    bank: Any = component("dataset", default=None)
    batch: int = field(default=250, validator=validators.ge(1))


@frozen(kw_only=True)
class RuntimeSpec:
    """How a recipe runs; nothing here but the precision changes what is computed.

    Args:
        precision: of the forward passes in synthesis, reconstruction and distillation; ``auto`` takes bfloat16 where
            the device is fast at it.
        device: ``auto`` takes an accelerator where there is one.
        threads: CPU threads, while the recipe runs; as they are where it is left out.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = field(default=None, validator=validators.optional([validators.ge(1), validators.le(1024)]))


def _is_shipped(_: Any, __: Any, value: str) -> None:
    if value not in shipped():
        raise ValueError(f"no shipped recipe is called {value!r}; `spdfq list recipe` names them")


@frozen(kw_only=True)
class PublishedRow:
    """One published number.

    Args:
        method: what the paper calls the images.
        images: shipped part that makes these images; where there is none the number is never compared.
        bits: of weights and activations, for example ``W4A4``.
        top1: in percent.
    """

    method: str
    images: str | None = field(default=None, validator=validators.optional(_is_shipped))
    bits: str = field(validator=validators.matches_re("W[2-8]A[2-8]"))
    top1: float = field(validator=[validators.ge(0.0), validators.le(100.0)])


@frozen(kw_only=True)
class Published:
    """What is known of the model, and what a paper reports for it; nothing is computed from it.

    Args:
        paper: where the rows are from.
        model: name and tag of the weights; a recipe with another model is neither checked nor compared.
        fp: top-1 in percent that these weights are known for in full precision; a run that measures another one stops.
        paper_fp: the same, as the paper reports it.
        images: how many images that was measured on.
        backend: shipped part with the back-end of the rows.
        rows: the paper's numbers.
    """

    paper: str
    model: str
    fp: float = field(validator=[validators.gt(0.0), validators.lt(100.0)])
    paper_fp: float | None = field(
        default=None, validator=validators.optional([validators.gt(0.0), validators.lt(100.0)])
    )
    images: int = field(validator=validators.ge(1))
    backend: str = field(validator=_is_shipped)
    rows: tuple[PublishedRow, ...] = ()

    def is_of(self, model: ModelSpec) -> bool:
        """Whether it is of that model, with the classes it was trained for."""
        return model.name == self.model and model.num_classes is None


@frozen(kw_only=True)
class Recipe:
    """Everything a run depends on.

    Args:
        schema: version of the recipe format.
        seed: seed of every random draw.
        model: the teacher.
        synthesis: where the calibration images come from.
        controls: other sources of images, by name. A run quantizes the model on each of them too, with the same
            back-end, and shows their accuracy beside its own.
        quantization: the back-end.
        evaluation: the labelled images the accuracy is measured on.
        runtime: device and precision.
        published: what a paper reports for the model, to compare with.
    """

    schema: int = field(default=SCHEMA)
    seed: int = field(default=0, validator=validators.ge(0))
    model: ModelSpec
    synthesis: Any = component("source")
    controls: dict[str, Any] = components("source")
    quantization: Quantization
    evaluation: Evaluation
    runtime: RuntimeSpec = field(factory=RuntimeSpec)
    published: Published | None = None

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
        lines = [f"synthesis: {line}" for line in advice()] if advice else []
        back_end = self.quantization
        wanted = back_end.activations.bits
        softmax = back_end.softmax if "softmax" in back_end.placement.kinds else None
        lines += [
            f"quantization.{key}: {quantizer.bits} bits, but activations have {wanted}; set {key}.bits = {wanted} "
            f"where the label W{back_end.weights.bits}A{wanted} is meant to hold"
            for key, quantizer in (("softmax", softmax), ("gelu", back_end.gelu))
            if quantizer is not None and quantizer.bits != wanted
        ]
        if self.model.random:
            lines.append("model: random weights; set pretrained = true or give a checkpoint")
        if self.published and not self.published.is_of(self.model):
            lines.append(f"published: is of {self.published.model}, so this model is neither checked nor compared")
        return lines


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
    if "model" not in data and data.keys() & {"base", "parents", "keys"}:
        raise RecipeError(["this is a bench file, not a recipe; 'spdfq bench' runs it"])
    problems: list[str] = []
    recipe = structure(Recipe, data, "", problems)
    if problems and isinstance(source, str) and source in shipped() and not whole(source):
        problems.insert(0, f"{source}: is a part of recipes and no whole one; name it under 'extends' of your own")
    if not problems and recipe.quantization.budget and getattr(recipe.synthesis, "needs_student", False):
        problems.append(
            "quantization.budget: is measured on finished images, but synthesis.student needs its bits before; leave "
            "one of the two out"
        )
    if problems:
        raise RecipeError(problems)
    return recipe


def digest(*parts: Any) -> str:
    """A short stable hash of plain data."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]
