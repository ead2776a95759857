"""More bits for the sites that cost most, as a fragment of a recipe, and the gain that they promise."""

from collections.abc import Sequence
from math import prod
from typing import Any

from attrs import evolve, frozen
from torch import Tensor

from spdfq.doctor.effects import TOP, SiteEffect
from spdfq.doctor.pair import Change, Images, Outcome, Pair
from spdfq.doctor.reference import reference_model
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.recipe import Override, Quantization, to_toml
from spdfq.recipe.structure import unstructure
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher

MOST_BITS = 8
# of the divergence: a site that promises less is not worth its bits
_LEAST_GAIN = 0.02


@frozen
class Suggestion:
    """More bits for some sites.

    Args:
        bits: the new bits by site.
        fragment: the same as TOML: all overrides of the recipe and the new ones, since a list in a recipe replaces
            that of the recipe it extends.
        kl: predicted divergence from the teacher on the calibration images.
        heldout_kl: on the held-out images; ``None`` without such images.
        top1: predicted top-1 on the held-out images in percent.
        weight_bits: mean bits of a quantized weight, before and after.
        activation_bits: mean bits of a quantized activation, before and after.
    """

    bits: dict[str, int]
    fragment: str
    kl: float
    heldout_kl: float | None
    top1: float | None
    weight_bits: tuple[float, float]
    activation_bits: tuple[float, float]


def suggested(
    pair: Pair,
    effects: Sequence[SiteEffect],
    teacher: Teacher,
    images: Images,
    spec: Quantization,
    runtime: Runtime,
    now: Outcome,
    heldout: Images | None,
) -> Suggestion | None:
    """Twice the bits, at most 8, for those of the first sites that need them; ``None`` if that promises nothing.

    All of the first sites get more bits together, since the gains of single sites do not add up. Then, from the last
    one on, each loses them again unless that raises the divergence on the calibration images by 2 % of its present
    value. The predicted model is the quantized one with the changed sites calibrated again; steps that learn are not
    run again.
    """
    model = pair.model
    candidates = {e.site: min(2 * e.bits, MOST_BITS) for e in effects[:TOP] if e.cost > 0 and e.bits < MOST_BITS}
    if not candidates:
        return None
    bits = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
    finer = reference_model(teacher, images.images, with_bits(spec, candidates), runtime, bits)
    chosen = {site: _change(pair, finer, site) for site in candidates}
    best = pair.all_quantized(images, chosen).kl
    for site in reversed(candidates):
        without = {name: change for name, change in chosen.items() if name != site}
        kl = pair.all_quantized(images, without).kl
        if kl - best < _LEAST_GAIN * now.kl:
            chosen, best = without, kl
    if not chosen or now.kl - best < _LEAST_GAIN * now.kl:
        return None
    found = {site: bits for site, bits in candidates.items() if site in chosen}
    there = pair.all_quantized(heldout, chosen) if heldout else None
    return Suggestion(
        bits=found,
        fragment=to_toml({"quantization": {"overrides": _tables(with_bits(spec, found).overrides)}}),
        kl=best,
        heldout_kl=there.kl if there else None,
        top1=there.top1 if there else None,
        weight_bits=_mean_bits(model, found, weights=True),
        activation_bits=_mean_bits(model, found, weights=False),
    )


def with_bits(spec: Quantization, bits: dict[str, int]) -> Quantization:
    """A quantization section with further overrides, one for each number of bits."""
    widths = dict.fromkeys(bits.values())
    more = [Override(sites=tuple(site for site in bits if bits[site] == width), bits=width) for width in widths]
    return evolve(spec, overrides=(*spec.overrides, *more))


def _tables(overrides: Sequence[Override]) -> list[dict[str, Any]]:
    """Overrides as plain data, without empty lists."""
    return [{key: value for key, value in unstructure(each).items() if value != []} for each in overrides]


def _change(pair: Pair, finer: QuantizedModel, site: str) -> Change:
    """What replaces the tensor of a site."""
    if pair.model.sites[site].kind == WEIGHT:
        weight = finer.quantizers[site](finer.weight(site)).detach()
        return lambda tensor: weight
    shift = pair.shift(site)

    def change(tensor: Tensor) -> Tensor:
        found: Tensor = finer.quantizers[site](tensor) + shift
        return found

    return change


def _mean_bits(model: QuantizedModel, changed: dict[str, int], weights: bool) -> tuple[float, float]:
    """Mean bits over all values of the quantized weights, or of the quantized activations, before and after."""
    names = [name for name in model.quantizers if (model.sites[name].kind == WEIGHT) == weights]
    sizes = {name: prod(model.sites[name].shape) for name in names}
    total = max(sum(sizes.values()), 1)
    before = sum(size * model.quantizers[name].bits for name, size in sizes.items()) / total
    after = sum(size * changed.get(name, model.quantizers[name].bits) for name, size in sizes.items()) / total
    return before, after
