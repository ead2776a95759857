"""Places quantizers: from a recipe's quantization section to a quantized model that is not yet calibrated."""

from fnmatch import fnmatchcase
from typing import Any

import attrs
import torch

from spdfq.errors import ComponentError, RecipeError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import GELU, INPUT, KEY, POINTS, PRODUCT, QUERY, SOFTMAX, VALUE, WEIGHT, Site, input_site
from spdfq.quantized.visiting import count_multiplications, find_sites
from spdfq.quantizers import Quantizer
from spdfq.quantizers.option_checks import BYTE
from spdfq.recipe import Override, Quantization
from spdfq.recipe.structure import unstructure
from spdfq.teacher import Teacher

_ROLES = {"first": "first_conv", "last": "classifier"}


def place(teacher: Teacher, spec: Quantization, bits: dict[str, int] | None = None) -> QuantizedModel:
    """A copy of the teacher's network with an uncalibrated quantizer at each site of the placement.

    Args:
        teacher: the float model.
        spec: the recipe's quantization section.
        bits: bit-widths by site that replace those of the section's quantizers, but not those of its overrides.

    Raises:
        RecipeError: overrides match no quantized site (all of them are named) or give one bits that it cannot have,
            the channel axis of an activation quantizer does not exist or is that of the images, or a weight quantizer
            accepts no negative values.
    """
    _check_templates(spec)
    example = torch.zeros(1, *teacher.input_size, device=teacher.device, dtype=torch.float32)
    with teacher.frozen() as network:
        sites, leftovers = find_sites(network, example, spec.placement.kinds & POINTS)
        multiplications = count_multiplications(network, example)
    bits = {**(bits or {}), **override_bits(teacher, spec, sites)}
    quantizers = {
        name: quantizer
        for name, site in sites.items()
        if site.kind in spec.placement.kinds and (quantizer := _new_quantizer(spec, site, bits.get(name))) is not None
    }
    _check_quantizers(spec, sites, quantizers)
    model = QuantizedModel(teacher.module, sites, quantizers, leftovers, (), multiplications).to(teacher.device)
    keys = {_section_key(spec, sites[name]) for name in quantizers}
    if spec.gelu is not None and "gelu" not in keys:
        model.note("gelu", ["no quantized site has the output of a GELU"])
    if spec.attention is not None and "attention" not in keys:
        model.note("attention", ["no quantized site has queries, keys or values of scaled_dot_product_attention"])
    model.note("model", attention_warnings(teacher, model))
    model.note("overrides", _inputs_quantized_earlier(teacher, spec, model))
    return model


def _check_templates(spec: Quantization) -> None:
    problems = []
    templates = {key: getattr(spec, key) for key in ("weights", "activations", "softmax", "attention", "gelu")}
    for key, template in templates.items():
        if template is None:
            continue
        if getattr(template, "folded", False):
            problems.append(f"quantization.{key}.folded: is what the step 'adalog' sets; leave it out")
    if problems:
        raise RecipeError(problems)


def _check_quantizers(spec: Quantization, sites: dict[str, Site], quantizers: dict[str, Quantizer]) -> None:
    """Refuses now what calibration would refuse only after the images were made."""
    for name, quantizer in quantizers.items():
        site, where = sites[name], f"quantization.{_section_key(spec, sites[name])}"
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


def _section_key(spec: Quantization, site: Site) -> str:
    """The key of the quantizer in the section that a site gets a copy of."""
    if site.kind in (WEIGHT, SOFTMAX):
        return {WEIGHT: "weights", SOFTMAX: "softmax"}[site.kind]
    if spec.attention is not None and site.kind in (QUERY, KEY, VALUE):
        return "attention"
    return "gelu" if spec.gelu is not None and site.maker == GELU else "activations"


def _new_quantizer(spec: Quantization, site: Site, bits: int | None) -> Quantizer | None:
    """A quantizer for a site, with the section's bits or others; ``None`` for 0 bits."""
    if bits == 0:
        return None
    template = getattr(spec, _section_key(spec, site))
    return attrs.evolve(template) if bits is None else attrs.evolve(template, bits=bits)


def override_bits(teacher: Teacher, spec: Quantization, sites: dict[str, Site]) -> dict[str, int]:
    """The bits of all sites that the section's overrides name.

    Raises:
        RecipeError: overrides match no quantized site, or one that cannot have their bits; all of them are named.
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
            problems += _wrong_bits(spec, [sites[name] for name in matched], override.bits, f"{path}.bits")
            bits.update(dict.fromkeys(matched, override.bits))
    if problems:
        raise RecipeError(problems)
    return bits


def _wrong_bits(spec: Quantization, sites: list[Site], bits: int, where: str) -> list[str]:
    """A line for the first site whose quantizer cannot have the bits of an override."""
    for site in sites:
        if site.kind == WEIGHT and bits > BYTE:
            return [f"{where}: {site.name} is a weight and cannot have {bits} bits; name activations only"]
        try:
            _new_quantizer(spec, site, bits)
        except ComponentError as error:
            return [f"{where}: {site.name}: {error}"]
    return []


def _patterns(teacher: Teacher, override: Override, path: str, problems: list[str]) -> list[tuple[str, str]]:
    """The patterns of an override over site names, each with its place in the recipe."""
    found = [(pattern, f"{path}.sites") for pattern in override.sites]
    for role in override.roles:
        if role == "last" and teacher.headless:
            continue  # the last layer is the head, and there is none
        modules = modules_of_role(teacher.module, role)
        if not modules:
            problems.append(
                f"{path}.roles: {teacher.name} does not say which module is {role!r}; name it under 'sites'"
            )
        found += [(f"{module}.*", f"{path}.roles") for module in modules]
    return found


def label_warnings(model: QuantizedModel, spec: Quantization) -> list[str]:
    """A warning for each number of the label (W4A4) that no site has, and for what the label leaves out."""
    in_float = float_warnings(model, spec)
    if spec.budget:
        return in_float
    found: dict[str, set[int]] = {"weights": set(), "activations": set()}
    for name, quantizer in model.quantizers.items():
        found["weights" if model.sites[name].kind == WEIGHT else "activations"].add(quantizer.bits)
    wanted = {"weights": spec.weights.bits, "activations": spec.activations.bits}
    return in_float + [
        f"quantization.overrides: no {what} have the {wanted[what]} bits of the label {spec.label}; they have "
        f"{', '.join(map(str, sorted(bits)))}"
        for what, bits in found.items()
        if bits and wanted[what] not in bits
    ]


def float_warnings(model: QuantizedModel, spec: Quantization) -> list[str]:
    """A warning if more than 1 % of the multiplications belong to products without sites, or if that is not known."""
    unseen = model.float_share().unseen
    known = {name: percent for name, percent in unseen.items() if percent is not None}
    largest = sorted(known, key=lambda name: -known[name])[:3]
    lines = []
    if sum(known.values()) > 1:
        names = ", ".join(f"{name} {known[name]:.1f} %" for name in largest)
        lines.append(
            f"quantization: {sum(known.values()):.1f} % of the multiplications cannot be quantized and stay in float, "
            f"so the model is not {spec.label} throughout: {names}"
        )
    if opaque := [name for name in unseen if name not in known]:
        lines.append(
            f"quantization: {', '.join(opaque[:3])}: an operator that cannot be looked into; whatever it multiplies "
            f"stays in float, so the model may not be {spec.label} throughout"
        )
    return lines


def attention_warnings(teacher: Teacher, model: QuantizedModel) -> list[str]:
    """A warning for a network that multiplies no activations with each other, such as a convolutional one."""
    attention = any(site.kind in (QUERY, KEY, VALUE, SOFTMAX, PRODUCT) for site in model.sites.values())
    if attention or model.float_share().unseen:  # what no site accounts for may be attention
        return []
    return [
        f"no attention was seen in {teacher.name}; spdfq is made for vision transformers, and most losses and some "
        "back-end steps need attention or LayerNorms"
    ]


def _inputs_quantized_earlier(teacher: Teacher, spec: Quantization, model: QuantizedModel) -> list[str]:
    """A line for each layer of a role whose weight has the override's bits and whose input has no own site."""
    if INPUT not in spec.placement.kinds:
        return []
    modules = [name for each in spec.overrides for role in each.roles for name in modules_of_role(teacher.module, role)]
    return [
        f"the input of {name} was quantized at an earlier site, whose bits are not the override's"
        for name in modules
        if f"{name}.weight" in model.quantizers and input_site(f"{name}.weight") not in model.sites
    ]


def modules_of_role(module: Any, role: str) -> list[str]:
    """Names of the modules that timm's configuration calls the ``first`` or the ``last``; empty without one."""
    named = (getattr(module, "pretrained_cfg", None) or {}).get(_ROLES[role]) or ()
    names = [named] if isinstance(named, str) else list(named)
    known = dict(module.named_modules())
    return [name for name in names if name in known]


def _examples(sites: dict[str, Site]) -> str:
    return f"sites are called {', '.join(list(sites)[:3])}, ..." if sites else "it has no sites"
