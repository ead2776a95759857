"""ERQ's closed form: weights compensate the error of their inputs, and rounding compensates its own error."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from attrs import define, field, validators
from einops import rearrange
from torch import Tensor

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.calibrate import fit_weights
from spdfq.backends.closed_form.layer_inputs import LayerInputs, LinearLayer, NormalEquations, input_rows
from spdfq.backends.closed_form.least_squares import ridge_regression, round_by_columns, round_by_halves
from spdfq.backends.finished_parts import FinishedParts
from spdfq.backends.weight_grid import WeightGrid
from spdfq.backends.wiring import wiring
from spdfq.errors import NonFiniteError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT, input_site
from spdfq.quantizers import GridMseObserver
from spdfq.recipe.structure import component
from spdfq.registry import steps


@steps.register("ridge", paper="arXiv:2407.06794")
@define(kw_only=True)
class Ridge(Step):
    """Change the weights of one linear layer after the other so that its output comes close to the teacher's.

    First ``ΔW = (AᵀA + λI)⁻¹AᵀY`` compensates the error of the inputs: A are the quantized inputs of the layer (and 1,
    for the bias) with all layers before it corrected, Y is the difference of its output from the teacher's. Then the
    weight is rounded, each time half of the remaining columns: up to ``flips`` roundings of a row are changed where
    that lowers δᵀE[xxᵀ]δ, and the remaining columns compensate the rest by the same regression (ERQ, arXiv 2407.06794).
    With ``rounding = "columns"`` the columns are rounded one by one instead, each to the nearest value (GPTQ, arXiv
    2210.17323). This is faster, and its error is lower if the inputs are correlated.
    There are no gradients, and the memory is a few matrices of a layer's width squared. Convolutions are rounded
    without correction; ``sites.json`` names them.

    Args:
        penalty: λ of the regressions, as published for 32 images of 197 tokens.
        rounding_penalty: λ for the compensation of the rounding; ``penalty`` by default.
        relative: multiply both by the mean over the input channels of the sum of squares over all tokens. The result
            then depends neither on the number of images nor on the scale of the inputs.
        min_rows: least number of rows of a layer's inputs (tokens of all images) for each of their channels. With
            fewer, the error of the inputs is not compensated, only that of rounding, and ``sites.json`` names the
            layer. A head has one row for each image: with few images, its weights would be fitted to these images.
        flips: largest number of changed roundings of a row for each half; not used with ``columns``.
        rounding: whether the columns are rounded by ``halves`` or as single ``columns``.
        weight_observer: chooses the range of each changed weight.
        batch: images per forward pass.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    changes_weights: ClassVar[bool] = True

    penalty: float = field(default=1000.0, validator=validators.gt(0.0))
    rounding_penalty: float | None = field(default=None, validator=validators.optional(validators.gt(0.0)))
    relative: bool = False
    min_rows: float = field(default=0.0, validator=validators.ge(0.0))
    flips: int = field(default=100, validator=validators.ge(0))
    rounding: Literal["halves", "columns"] = "halves"
    weight_observer: Any = component("observer", default=GridMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses weights whose values are not evenly spaced, and ranges that were not chosen before."""
        super().check(model, before)
        check_calibrated_by(before, model)
        for name in model.weight_names():
            if model.weight(name).ndim == 2:
                model.affine(name)

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Corrects every linear layer; blocks that a killed run finished are read from its state file.

        Raises:
            SpdfqError: a site was not calibrated, the values of a weight's quantizer are not evenly spaced, or the
                penalty is too small.
            NonFiniteError: the inputs or outputs of a layer are not finite.
        """
        model.check_calibrated()
        layers = self._layers(model, calibration.images)
        finished = FinishedParts.of(model, calibration, self, "ridge")
        with (
            calibration.teacher.frozen() as float_network,
            calibration.runtime.progress("correcting layers", len(layers)) as advance,
        ):
            inputs = LayerInputs(model, float_network, calibration.images, self.batch)
            for call, group in inputs.by_block(layers):
                inputs.enter(call)
                names = [name for layer in group for name in _changed(model, layer)]
                if finished.restore(names):
                    advance(len(group))
                else:
                    for layer in group:
                        found = inputs.normal_equations(layer, call)
                        try:
                            self._correct(model, layer, found)
                        except torch.linalg.LinAlgError:
                            raise SpdfqError(
                                f"ridge: {layer.weight}: penalty = {self.penalty:g} is too small to invert its inputs' "
                                "products; raise it"
                            ) from None
                        advance()
                    finished.keep(names)
                inputs.leave(call)

    def _layers(self, model: QuantizedModel, images: Tensor) -> list[LinearLayer]:
        linears = wiring(model.network, images[:1]).linears
        weights = [name for name, site in model.sites.items() if site.kind == WEIGHT]
        others = [name for name in model.weight_names() if name not in linears]
        model.note("ridge", (f"{name} is rounded without correction" for name in others))
        weights = [name for name in weights if name in linears]
        few = self._with_few_rows(model, weights, images) if self.min_rows else []
        layers = [LinearLayer(name, linears[name].bias(model.network), name not in few) for name in weights]
        for layer in layers:
            if layer.weight in model.quantizers:
                model.affine(layer.weight)  # refused before anything is changed
            if layer.bias:
                model.bias(layer.bias)
        return layers

    def _with_few_rows(self, model: QuantizedModel, weights: list[str], images: Tensor) -> list[str]:
        """The weights whose inputs have fewer rows than ``min_rows`` allows; they are noted."""
        of_an_image = input_rows(model, images[:1])
        rows = {name: len(images) * of_an_image[input_site(name)] for name in weights}
        few = [name for name in weights if rows[name] < self.min_rows * model.weight(name).shape[1]]
        lines = (f"{name}: the error of its inputs is not compensated, {rows[name]} rows are too few" for name in few)
        model.note("ridge", lines)
        return few

    def _correct(self, model: QuantizedModel, layer: LinearLayer, found: NormalEquations) -> None:
        weight = model.weight(layer.weight)
        biases = [model.bias(layer.bias)] if layer.bias else []
        columns = [rearrange(part.double(), "k ... -> k (...)") for part in (weight, *biases)]
        unit = _mean_square_sum(found.gram, len(biases)) if self.relative else 1.0
        rounding_penalty = unit * (self.penalty if self.rounding_penalty is None else self.rounding_penalty)
        wanted = torch.cat(columns, 1)
        if layer.compensated:
            wanted += self._compensation(layer, found, unit * self.penalty)
        weight.copy_(wanted[:, : weight.shape[1]])
        result = wanted
        if layer.weight in model.quantizers:
            fit_weights(model, self.weight_observer, [layer.weight])
            grid = WeightGrid.of(model.affine(layer.weight), weight)
            if self.rounding == "halves":
                result = round_by_halves(wanted, found.gram, rounding_penalty, self.flips, grid, len(biases))
            else:
                result = round_by_columns(wanted, found.gram, rounding_penalty, grid, len(biases))
        weight.copy_(result[:, : weight.shape[1]])
        if layer.weight in model.quantizers:
            weight.copy_(model.quantizers[layer.weight](weight))  # exactly the values that the quantizer decodes
        for bias in biases:
            bias.copy_(result[:, -1])

    def _compensation(self, layer: LinearLayer, found: NormalEquations, penalty: float) -> Tensor:
        """What to add to the weight (and to the bias, the last column) for the error of the inputs, ``[k, d]``."""
        if not bool(found.gram.isfinite().all() and found.cross.isfinite().all()):
            raise NonFiniteError(f"ridge: {layer.weight}: its inputs or outputs are not finite; check the images")
        return ridge_regression(found.gram, found.cross, penalty).T


def _mean_square_sum(gram: Tensor, biases: int) -> float:
    """Mean of the diagonal of a Gram matrix ``[d + biases, d + biases]`` over the d channels; 1 if all are zero."""
    return float(gram.diagonal()[: len(gram) - biases].mean()) or 1.0


def _changed(model: QuantizedModel, layer: LinearLayer) -> list[str]:
    """Names, in `QuantizedModel.tensors`, of the tensors that the correction of a layer changes."""
    names = [layer.weight, *([layer.bias] if layer.bias else [])]
    quantizer = model.quantizers.get(layer.weight)
    return names + [f"{layer.weight}_quantizer.{name}" for name in (quantizer.stores if quantizer else ())]
