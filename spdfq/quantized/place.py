"""From a recipe's quantization section to a quantized model that is not yet calibrated."""

from fnmatch import fnmatchcase
from typing import Any

import attrs
import torch

from spdfq.errors import RecipeError
from spdfq.quantized.model import QuantizedModel, Site, find_sites
from spdfq.quantized.products import GELU, INPUT, POINTS, SOFTMAX, WEIGHT, input_site
from spdfq.quantizers import Quantizer
from spdfq.recipe import Override, Quantization
from spdfq.recipe.structure import unstructure
from spdfq.teacher import Teacher

_ROLES = {"first": "first_conv", "last": "classifier"}


def place(teacher: Teacher, spec: Quantization, bits: dict[str, int] | None = None) -> QuantizedModel:
    """A copy of the teacher's network with an uncalibrated quantizer at each site of the placement.

    Args:
        teacher: the float model.
        spec: the recipe's quantization section.
        bits: by site, where they are not those of the section's quantizers; overrides come first.

    Raises:
        RecipeError: an override that matches no quantized site; all such at once. Or a quantizer of activations whose
            channels are the images or on an axis that is not there, or one of weights that takes no negative values.
    """
    _check_templates(spec)
    example = torch.zeros(1, *teacher.input_size, device=teacher.device)
    with teacher.frozen() as network:
        sites, leftovers = find_sites(network, example, spec.placement.kinds & POINTS)
    bits = {**(bits or {}), **overridden(teacher, spec, sites)}
    quantizers = {
        name: quantizer
        for name, site in sites.items()
        if site.kind in spec.placement.kinds and (quantizer := _fresh(spec, site, bits.get(name))) is not None
    }
    _check_sites(spec, sites, quantizers)
    model = QuantizedModel(teacher.module, sites, quantizers, leftovers).to(teacher.device)
    if spec.gelu is not None and not any(sites[name].maker == GELU for name in quantizers):
        model.note("gelu", ["no quantized site takes what a GELU puts out"])
    model.note("overrides", _fed_elsewhere(teacher, spec, model))
    return model


def _check_templates(spec: Quantization) -> None:
    problems = []
    templates = {key: getattr(spec, key) for key in ("weights", "activations", "softmax", "gelu")}
    for key, template in templates.items():
        if template is None:
            continue
        if getattr(template, "folded", False):
            problems.append(f"quantization.{key}.folded: is what the step 'adalog' sets; leave it out")
    if problems:
        raise RecipeError(problems)


def _check_sites(spec: Quantization, sites: dict[str, Site], quantizers: dict[str, Quantizer]) -> None:
    """Refuse what calibration would, after the images were made."""
    for name, quantizer in quantizers.items():
        site, where = sites[name], f"quantization.{_key(spec, sites[name])}"
        if site.kind == WEIGHT and not quantizer.signed:
            kind = unstructure(quantizer, "quantizer")["type"]
            raise RecipeError([f"{where}: {kind!r} takes no negative values; weights need one that does ('uniform')"])
        count = len(site.shape)
        for axis in {axis for stored in quantizer.stores if (axis := quantizer.axis_of(stored)) is not None}:
            if not -count <= axis < count:
                shape = list(site.shape)
                raise RecipeError([f"{where}: {name} of shape {shape} has no axis {axis}, but 0 to {count - 1}"])
            if site.kind != WEIGHT and axis % count == 0:
                raise RecipeError([f"{where}: axis {axis} is that of the images; the features are on axis -1"])


def _key(spec: Quantization, site: Site) -> str:
    """Which of the section's quantizers a site gets."""
    rest = "gelu" if spec.gelu is not None and site.maker == GELU else "activations"
    return {WEIGHT: "weights", SOFTMAX: "softmax"}.get(site.kind, rest)


def _fresh(spec: Quantization, site: Site, bits: int | None) -> Quantizer | None:
    if bits == 0:
        return None
    template = getattr(spec, _key(spec, site))
    return attrs.evolve(template) if bits is None else attrs.evolve(template, bits=bits)


def overridden(teacher: Teacher, spec: Quantization, sites: dict[str, Site]) -> dict[str, int]:
    """Bits of the sites that the section's overrides name.

    Raises:
        RecipeError: an override that matches no quantized site; all such at once.
    """
    sites = {name: site for name, site in sites.items() if site.kind in spec.placement.kinds}
    bits: dict[str, int] = {}
    problems: list[str] = []
    for index, override in enumerate(spec.overrides):
        path = f"quantization.overrides.{index}"
        for pattern, where in _patterns(teacher, override, path, problems):
            matched = [name for name in sites if fnmatchcase(name, pattern)]
            if not matched:
                problems.append(f"{where}: {pattern!r} matches no quantized site of {teacher.name}; {_examples(sites)}")
            bits.update(dict.fromkeys(matched, override.bits))
    if problems:
        raise RecipeError(problems)
    return bits


def _patterns(teacher: Teacher, override: Override, path: str, problems: list[str]) -> list[tuple[str, str]]:
    found = [(pattern, f"{path}.sites") for pattern in override.sites]
    for role in override.roles:
        if role == "last" and teacher.headless:
            continue  # the role is the head's, which is not there
        modules = _modules_of(teacher.module, role)
        if not modules:
            problems.append(
                f"{path}.roles: {teacher.name} does not say which module is {role!r}; name it under 'sites'"
            )
        found += [(f"{module}.*", f"{path}.roles") for module in modules]
    return found


def beside_the_label(model: QuantizedModel, spec: Quantization) -> list[str]:
    """A warning for each number of the label, W4A4, that overrides left no site with."""
    if spec.budget:
        return []
    found: dict[str, set[int]] = {"weights": set(), "activations": set()}
    for name, quantizer in model.quantizers.items():
        found["weights" if model.sites[name].kind == WEIGHT else "activations"].add(quantizer.bits)
    wanted = {"weights": spec.weights.bits, "activations": spec.activations.bits}
    return [
        f"quantization.overrides: leave no {what} the {wanted[what]} bits of the label {spec.label}, but "
        f"{', '.join(map(str, sorted(bits)))}"
        for what, bits in found.items()
        if bits and wanted[what] not in bits
    ]


def _fed_elsewhere(teacher: Teacher, spec: Quantization, model: QuantizedModel) -> list[str]:
    """A line for each layer of a role whose weight has the override's bits and whose input has no site of its own."""
    if INPUT not in spec.placement.kinds:
        return []
    modules = [name for each in spec.overrides for role in each.roles for name in _modules_of(teacher.module, role)]
    return [
        f"{name} takes what was quantized at a point before it, whose bits are not the override's"
        for name in modules
        if f"{name}.weight" in model.quantizers and input_site(f"{name}.weight") not in model.sites
    ]


def _modules_of(module: Any, role: str) -> list[str]:
    named = (getattr(module, "pretrained_cfg", None) or {}).get(_ROLES[role]) or ()
    names = [named] if isinstance(named, str) else list(named)
    known = dict(module.named_modules())
    return [name for name in names if name in known]


def _examples(sites: dict[str, Site]) -> str:
    return f"sites are called {', '.join(list(sites)[:3])}, ..." if sites else "it has no sites"
