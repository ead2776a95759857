"""AdaLog's bias folding: the shift of a shifted logarithm moves into the bias of the layer that follows."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs import define

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.wiring import wiring
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT, input_site
from spdfq.quantizers import AdaptiveLogQuantizer
from spdfq.registry import steps


@steps.register("adalog", paper="arXiv:2407.12951")
@define(kw_only=True)
class AdaLog(Step):
    """Fold the shift of GELU outputs into biases, so that the values that a layer multiplies are powers only.

    A shifted ``adaptive_log`` quantizes x + shift and subtracts the shift from the result, which costs an integer
    runtime time. After this step it does not subtract the shift, and the layer's bias becomes ``c - shift · Ŵ 1`` with
    the quantized weight Ŵ. The output stays the same except for rounding (AdaLog, arXiv 2407.12951, section 3.3). Put
    it last, because Ŵ must not change afterwards. Inputs of layers that are not linear keep their shift; ``sites.json``
    names them.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    replaces_quantizers: ClassVar[bool] = True
    fixes_weights: ClassVar[bool] = True

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses ranges that were not chosen before."""
        check_calibrated_by(before, model)

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Folds every shift; the model's notes list those that cannot be folded.

        Raises:
            SpdfqError: a site was not calibrated.
        """
        model.check_calibrated()
        linears = wiring(model.network, calibration.images[:1]).linears
        biases = {input_site(name): calls.bias(model.network) for name, calls in linears.items()}
        weights = {input_site(name): name for name in linears}
        for site, quantizer in list(model.quantizers.items()):
            if not isinstance(quantizer, AdaptiveLogQuantizer) or not quantizer.shift or quantizer.folded:
                continue
            if (bias := biases.get(site)) is None:
                model.note("adalog", [f"{site} keeps its shift: no bias that follows can be changed"])
                continue
            weight = model.quantized(weights[site], WEIGHT, model.weight(weights[site]))
            model.bias(bias).sub_((quantizer.shift * weight.double().sum(1)).float())
            folded = attrs.evolve(quantizer, folded=True)
            folded.restore(quantizer.tensors())
            model.replace_quantizer(site, folded)
