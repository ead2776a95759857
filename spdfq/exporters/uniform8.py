"""Other quantizers of activations replaced by uniform ones of 8 bits, which have integer kernels."""

import copy

import torch
from torch import Tensor

from spdfq.errors import ModelError
from spdfq.exporters.lowering import has_integers
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import INPUT, WEIGHT
from spdfq.quantizers import AdaptiveLogQuantizer, GridMseObserver, Quantizer, UniformQuantizer
from spdfq.registry import quantizers as registered

BITS = 8
_BATCH = 32


@torch.no_grad()
def with_uniform_activations(model: QuantizedModel, images: Tensor) -> tuple[QuantizedModel, list[str]]:
    """A copy of a model in which every activation has evenly spaced values and one scale, and a line for each change.

    A new quantizer has 8 bits and the range of least mean squared error on the images.

    Args:
        model: calibrated; it does not change.
        images: normalised, ``[n, C, H, W]``.

    Raises:
        ModelError: a shift that is folded into a bias cannot be taken out of it again.
    """
    changed = copy.deepcopy(model)
    wanted = {
        name: UniformQuantizer(bits=BITS)
        for name, old in model.quantizers.items()
        if model.sites[name].kind != WEIGHT and not has_integers(old, model.sites[name].kind)
    }
    for name in wanted:
        old = model.quantizers[name]
        if isinstance(old, AdaptiveLogQuantizer) and old.folded:
            _unfold(changed, name, old.shift)
    _observe(changed, wanted, images)
    for name, quantizer in wanted.items():
        quantizer.freeze(GridMseObserver())
        changed.replace_quantizer(name, quantizer)
    return changed, [_line(name, model.quantizers[name], quantizer) for name, quantizer in wanted.items()]


def _line(name: str, old: Quantizer, new: UniformQuantizer) -> str:
    ends = torch.tensor([0, new.levels - 1], device=new.tensors()["scale"].device)
    low, high = new.decode(ends).tolist()
    kind = registered.label(old)
    return f"{name}: {kind} of {old.bits} bits is now uniform of {BITS} bits, from {low:.4g} to {high:.4g}"


def _observe(model: QuantizedModel, wanted: dict[str, UniformQuantizer], images: Tensor) -> None:
    """Shows quantizers the float tensors at their sites, of a network that is quantized everywhere else."""

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        if name not in wanted:
            return model.quantized(name, kind, tensor)
        wanted[name].observe(tensor)
        return tensor

    device = next(model.network.parameters()).device
    with model.visiting(visit):
        for batch in images.split(_BATCH):
            model.network(batch.to(device))


def _unfold(model: QuantizedModel, site: str, shift: float) -> None:
    """Takes a shift out of the bias of the layer that follows; the step 'adalog' has folded it into it."""
    weight = site.removesuffix(INPUT) + WEIGHT
    if weight not in model.sites:
        raise ModelError(f"{site}: the bias that its shift is folded into is not known; export with softmax 'float'")
    values = model.quantized(weight, WEIGHT, model.weight(weight))
    model.bias(weight.removesuffix(WEIGHT) + "bias").add_((shift * values.double().sum(1)).float())
