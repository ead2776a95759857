"""ERQ's closed-form repair: weights that undo the error of their inputs, then rounding that repairs itself."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.calibrate import fit_weights
from spdfq.backends.closed_form.least_squares import ridge, round_by_halves
from spdfq.backends.learning.feed import Feed, Layer, Products
from spdfq.backends.learning.state import Finished
from spdfq.backends.transforms.grid import Grid
from spdfq.backends.transforms.wiring import wiring
from spdfq.errors import NonFiniteError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import WEIGHT
from spdfq.quantizers import GridMseObserver
from spdfq.recipe.structure import component
from spdfq.registry import steps


@steps.register("ridge", paper="arXiv:2407.06794")
@define(kw_only=True)
class Ridge(Step):
    """Change the weights of one linear layer after the other so that its output comes back to the teacher's.

    First ``ΔW = (AᵀA + λI)⁻¹AᵀY`` for the error of the inputs: A are the layer's quantized inputs (and 1, for the bias)
    behind everything repaired before, Y is what the output lacks to the teacher's. Then the weight is rounded, half of
    the columns left at a time: up to ``flips`` roundings of a row are changed where that lowers δᵀE[xxᵀ]δ, and the
    columns left make good the rest by the same regression (ERQ, arXiv 2407.06794). No gradients; memory is a few
    matrices of a layer's width squared. Convolutions are rounded as they are; ``sites.json`` names them.

    Args:
        penalty: λ of the regressions, as published for 32 images of 197 tokens.
        flips: changed roundings of a row for each half, at most.
        weight_observer: chooses the range of each changed weight.
        batch: images per forward pass.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER

    penalty: float = field(default=1000.0, validator=validators.gt(0.0))
    flips: int = field(default=100, validator=validators.ge(0))
    weight_observer: Any = component("observer", default=GridMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuse weights whose values are not evenly spaced, and to come before calibration."""
        check_calibrated_by(before, model)
        for name in model.weight_names():
            if model.weight(name).ndim == 2:
                model.affine(name)

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Repair every linear layer; blocks that a killed run finished are taken from its state file.

        Raises:
            SpdfqError: a site was not calibrated, the values of a weight's quantizer are not evenly spaced, or the
                penalty is too small.
            NonFiniteError: the inputs or outputs of a layer are.
        """
        model.check_calibrated()
        layers = self._layers(model, calibration.images[:1])
        finished = Finished.of(model.network, calibration, "ridge")
        with (
            calibration.teacher.frozen() as float_network,
            calibration.runtime.progress("repairing layers", len(layers)) as advance,
        ):
            feed = Feed(model, float_network, calibration.images, self.batch)
            for call, group in feed.by_block(layers):
                feed.enter(call)
                names = [name for layer in group for name in _changed(model, layer)]
                if not finished.restore(names):
                    for layer in group:
                        self._repair(model, layer, feed.products(layer, call))
                        advance()
                    finished.keep(names)
                else:
                    advance(len(group))
                feed.leave(call)

    def _layers(self, model: QuantizedModel, example: Tensor) -> list[Layer]:
        linears = wiring(model.network, example).linears
        weights = [name for name, site in model.sites.items() if site.kind == WEIGHT]
        model.note("ridge", (f"{name} is rounded as it is" for name in model.weight_names() if name not in linears))
        layers = [Layer(name, linears[name].bias(model.network)) for name in weights if name in linears]
        for layer in layers:
            if layer.weight in model.quantizers:
                model.affine(layer.weight)  # refused before anything is changed
            if layer.bias:
                model.bias(layer.bias)
        return layers

    def _repair(self, model: QuantizedModel, layer: Layer, found: Products) -> None:
        if not bool(found.gram.isfinite().all() and found.gap.isfinite().all()):
            raise NonFiniteError(f"ridge: {layer.weight}: its inputs or outputs are not finite; check the images")
        weight = model.weight(layer.weight)
        biases = [model.bias(layer.bias)] if layer.bias else []
        wanted = torch.cat([part.double().reshape(len(weight), -1) for part in (weight, *biases)], 1)
        try:
            wanted = wanted + ridge(found.gram, found.gap, self.penalty).T
        except torch.linalg.LinAlgError:
            raise SpdfqError(
                f"ridge: {layer.weight}: penalty = {self.penalty:g} is too small to invert its inputs' products; "
                "raise it"
            ) from None
        weight.copy_(wanted[:, : weight.shape[1]])
        result = wanted
        if layer.weight in model.quantizers:
            fit_weights(model, self.weight_observer, [layer.weight])
            quantizer = model.affine(layer.weight)
            grid = Grid.of(quantizer, weight)
            result = round_by_halves(wanted, found.gram, self.penalty, self.flips, grid, len(biases))
        weight.copy_(result[:, : weight.shape[1]])
        if layer.weight in model.quantizers:
            weight.copy_(model.quantizers[layer.weight](weight))  # to the bit
        for bias in biases:
            bias.copy_(result[:, -1])


def _changed(model: QuantizedModel, layer: Layer) -> list[str]:
    """Names, in the network's state dict, of what the repair of a layer changes."""
    names = [layer.weight, *([layer.bias] if layer.bias else [])]
    quantizer = model.quantizers.get(layer.weight)
    return names + [f"{layer.weight}_quantizer.{name}" for name in (quantizer.stores if quantizer else ())]
