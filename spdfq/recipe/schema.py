"""The sections of a recipe, and the checks of their values."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen, validators

from spdfq.errors import RecipeError
from spdfq.recipe.files import is_complete, resolve, shipped
from spdfq.recipe.structure import Checked, component, component_list, components, structure, unstructure

SCHEMA = 1


def _none_or_several(_: Any, __: Any, value: int | None) -> None:
    if value is not None and value != 0 and value < 2:
        raise ValueError(f"must be at least 2, or 0 for the model without its head, got {value}")


def _sides(_: Any, __: Any, value: int | tuple[int, int] | None) -> None:
    sides = () if value is None else (value,) if isinstance(value, int) else value
    if any(side < 8 for side in sides):
        raise ValueError(f"must be at least 8 pixels, got {value if isinstance(value, int) else list(sides)}")


@frozen(kw_only=True)
class ModelSpec(Checked):
    """The teacher: a timm name, or ``bundled:vit_fmnist``, or a timm architecture with a local checkpoint.

    Args:
        name: timm model name with its tag; or ``bundled:`` and the name of a bundled model, ``hf-hub:owner/name`` for a
            timm model on the Hugging Face hub, ``local-dir:`` and a folder that timm's ``save_for_hf`` wrote.
        pretrained: download timm's weights from the hub (ignored for bundled models and local checkpoints).
        checkpoint: safetensors file with local weights, used instead of the hub's.
        num_classes: number of classes of the head, if it differs from the architecture's default; 0 removes the head.
        img_size: side of the input in pixels, or ``[height, width]``, if it differs from the model's default.
    """

    name: str
    pretrained: bool = True
    checkpoint: str | None = None
    num_classes: int | None = field(default=None, validator=_none_or_several)
    img_size: int | tuple[int, int] | None = field(default=None, validator=_sides)

    @property
    def bundled(self) -> bool:
        """Whether the weights are part of this library."""
        return self.name.startswith("bundled:")

    @property
    def random(self) -> bool:
        """Whether the weights are random, because no source of trained weights is given."""
        return not (self.pretrained or self.checkpoint or self.bundled)


@frozen(kw_only=True)
class Override(Checked):
    """A different bit-width for some sites.

    Args:
        sites: shell-style patterns of site names (``blocks.0.*``); a pattern that matches no site is an error.
        roles: ``first`` is the first convolution and ``last`` the classifier, as timm names them.
        bits: bit-width of every quantizer at these sites; 0 leaves them in float, and 16 is for activations with the
            quantizer ``uniform``.
    """

    sites: tuple[str, ...] = ()
    roles: tuple[Literal["first", "last"], ...] = ()
    bits: int = field(validator=validators.in_((0, 2, 3, 4, 5, 6, 7, 8, 16)))

    def __attrs_post_init__(self) -> None:
        if not self.sites and not self.roles:
            raise ValueError("names no site; give 'sites' (patterns) or 'roles' (first, last)")


@frozen(kw_only=True)
class Budget(Checked):
    """A limit on the bits of all sites together; sites that are more sensitive get more of them.

    Sites with an override keep its bits, and count towards the budget.

    Args:
        weights: mean bits of a quantized weight (the size of the model); activations keep their bits.
        operations: mean of the product of the bits of both factors, over all multiplications of two quantized numbers;
            16 for W4A4.
        choices: bit-widths that a site can have.
        images: number of images that the sensitivity of the sites is measured on.
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
class Quantization(Checked):
    """The back-end: which tensors are quantized, with which quantizers, and by which steps.

    Args:
        placement: which tensors are quantized.
        weights: quantizer of every weight.
        activations: quantizer of every activation that is not a softmax output.
        softmax: quantizer of attention probabilities.
        attention: quantizer of queries, keys and values, if it differs from that of the other activations; symmetric
            where a runtime needs it for integer attention.
        gelu: quantizer of GELU outputs, if it differs from that of the other activations.
        overrides: different bit-widths for some sites.
        budget: chooses the bit-width of each site; without it, sites have the bits of their quantizer.
        steps: calibration, transforms and reconstruction, in order.
    """

    placement: Any = component("placement")
    weights: Any = component("quantizer")
    activations: Any = component("quantizer")
    softmax: Any = component("quantizer")
    attention: Any = component("quantizer", default=None)
    gelu: Any = component("quantizer", default=None)
    overrides: tuple[Override, ...] = ()
    budget: Budget | None = None
    steps: tuple[Any, ...] = component_list("step")

    def __attrs_post_init__(self) -> None:
        if not self.steps:
            raise ValueError("has no steps; the first one is usually { type = 'calibrate' }")
        if self.weights.bits > 8:
            raise ValueError(f"weights.bits must be from 2 to 8, not {self.weights.bits}; 16 bits are for activations")

    @property
    def label(self) -> str:
        """The bits in short: ``W4A4``; with a budget, ``W4.0A4`` for weights and ``16.0 BOP`` for operations.

        A32 if the placement leaves activations in float.
        """
        if self.budget and self.budget.operations:
            return f"{self.budget.operations} BOP"
        weights = self.budget.weights if self.budget else self.weights.bits
        return f"W{weights}A{self.activations.bits if self.placement.kinds - {'weight'} else 32}"

    def warnings(self) -> list[str]:
        """One line for each quantizer whose bits are not those of the label."""
        wanted = self.activations.bits
        softmax = self.softmax if "softmax" in self.placement.kinds else None
        attention = self.attention if self.placement.kinds & {"query", "key", "value"} else None
        of_that_width = " and {0}.type = 'uniform'" if wanted > 8 else ""  # the only type with so many
        return [
            f"quantization.{key}: {quantizer.bits} bits, but activations have {wanted}; for "
            f"W{self.weights.bits}A{wanted} set {key}.bits = {wanted}" + of_that_width.format(key)
            for key, quantizer in (("softmax", softmax), ("attention", attention), ("gelu", self.gelu))
            if quantizer is not None and quantizer.bits != wanted
        ]


@frozen(kw_only=True)
class Evaluation(Checked):
    """How the accuracy is measured.

    Args:
        dataset: labelled images.
        bank: other labelled images, only for a model without a head: k-NN accuracy uses their features.
        batch: images per forward pass.
        precision: of the forward passes of both models; ``runtime.precision`` does not change it, so that numbers from
            different machines can be compared.
    """

    dataset: Any = component("dataset")
    bank: Any = component("dataset", default=None)
    batch: int = field(default=250, validator=validators.ge(1))
    precision: Literal["float32", "bfloat16"] = "float32"


@frozen(kw_only=True)
class RuntimeSpec(Checked):
    """How a recipe runs. Only the precision changes what is computed; the others can change the last digits.

    Args:
        precision: of the forward passes in synthesis, reconstruction and distillation; ``auto`` uses bfloat16 if the
            device computes it fast.
        compile: in synthesis, run the teacher's forward pass as `torch.compile` makes it. A teacher whose compiled pass
            differs, or cannot be made, is refused.
        device: ``auto`` uses an accelerator if there is one.
        threads: number of CPU threads while the recipe runs; without it, torch's current setting.
        tracker: what the results are sent to when the run is finished; nothing by default.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = field(default=None, validator=validators.optional([validators.ge(1), validators.le(1024)]))
    tracker: Any = component("tracker", default=None)


def _is_shipped(_: Any, __: Any, value: str) -> None:
    if value not in shipped():
        raise ValueError(f"no shipped recipe is called {value!r}; `spdfq list recipe` lists them")


@frozen(kw_only=True)
class PublishedRow(Checked):
    """One published number.

    Args:
        method: the paper's name for the images.
        images: shipped part that makes these images; without it, the number is never compared.
        bits: bits of weights and activations, for example ``W4A4``.
        top1: top-1 accuracy in percent.
    """

    method: str
    images: str | None = field(default=None, validator=validators.optional(_is_shipped))
    bits: str = field(validator=validators.matches_re("W[2-8]A[2-8]"))
    top1: float = field(validator=[validators.ge(0.0), validators.le(100.0)])


@frozen(kw_only=True)
class Published(Checked):
    """Published accuracies of the model, to check and compare with; no result depends on them.

    Args:
        paper: source of the rows.
        model: name and tag of the weights; a recipe with another model is neither checked nor compared.
        fp: published full-precision top-1 of these weights, in percent; a run that measures a different one stops.
        paper_fp: full-precision top-1 that the paper reports, in percent.
        images: number of images that ``fp`` was measured on.
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
        """Whether the numbers are for this model, with the classes it was trained for."""
        return model.name == self.model and model.num_classes is None


@frozen(kw_only=True)
class Recipe(Checked):
    """Everything a run depends on.

    Args:
        schema: version of the recipe format.
        seed: seed of every random draw.
        model: the teacher.
        synthesis: source of the calibration images.
        controls: other sources of images, by name. A run quantizes the model on each of them too, with the same
            back-end, and shows their accuracy beside its own.
        quantization: the back-end.
        evaluation: labelled images that the accuracy is measured on.
        runtime: device and precision.
        published: published accuracies of the model, to compare with.
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
        """The recipe as plain data, with every default written out."""
        data: dict[str, Any] = unstructure(self)
        return data if self.controls else {key: value for key, value in data.items() if key != "controls"}

    def sources(self) -> list[tuple[str, Any]]:
        """The recipe's own source of images and those of its controls, each with its key."""
        return [("synthesis", self.synthesis), *((f"controls.{name}", it) for name, it in self.controls.items())]

    def warnings(self) -> list[str]:
        """One line for each setting that runs but is probably a mistake."""
        advised = [(key, source.advice()) for key, source in self.sources() if hasattr(source, "advice")]
        lines = [f"{key}: {line}" for key, advice in advised for line in advice]
        lines += self.quantization.warnings()
        if self.model.random:
            lines.append("model: random weights; set pretrained = true or give a checkpoint")
        if self.published and not self.published.is_of(self.model):
            lines.append(f"published: is for {self.published.model}, so this model is neither checked nor compared")
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
    data = given_data(source, overrides, seed)
    problems: list[str] = []
    recipe = structure(Recipe, data, "", problems)
    if problems and isinstance(source, str) and source in shipped() and not is_complete(source):
        problems.insert(0, f"{source}: is only a part of a recipe; name it under 'extends' in a recipe of your own")
    if not problems:
        problems += student_problems(recipe.sources(), recipe.quantization)
    if problems:
        raise RecipeError(problems)
    return recipe


def given_data(source: str | Path | dict[str, Any], overrides: Iterable[str], seed: int | None) -> dict[str, Any]:
    """The merged plain data of a recipe or of a part, which is neither empty nor a bench file."""
    data = resolve(source, overrides, seed)
    if not data:
        raise RecipeError([f"{source or 'recipe'}: is empty; 'spdfq init quickstart' prints a recipe to start from"])
    if "model" not in data and data.keys() & {"base", "parents", "keys"}:
        raise RecipeError(["this is a bench file, not a recipe; 'spdfq bench' runs it"])
    return data


def student_problems(sources: list[tuple[str, Any]], quantization: Quantization) -> list[str]:
    """A line for each source with a student whose bits are chosen only when there are images."""
    if not quantization.budget:
        return []
    return [
        f"quantization.budget: needs finished images, but {key}.student needs the bits before there are images; "
        "leave one of them out"
        for key, source in sources
        if getattr(source, "needs_student", False)
    ]


def digest(*parts: Any) -> str:
    """A hash of plain data, 20 hexadecimal digits."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]
