"""FQ-ViT's power-of-two factors: finer steps for channels of small values where they enter a LayerNorm."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import define, field, validators
from torch import nn

from spdfq.backends.base import NEITHER, Calibration, Step
from spdfq.backends.calibrate import observe_activations
from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import RESIDUAL
from spdfq.quantizers import MinMaxObserver, PowerOfTwoFactorQuantizer
from spdfq.quantizers.option_checks import BYTE
from spdfq.recipe.structure import component
from spdfq.registry import steps


@steps.register("ptf", paper="arXiv:2111.13824")
@define(kw_only=True)
class PowerOfTwoFactors(Step):
    """Give the residual sums, which are the inputs of LayerNorms, a power-of-two factor for each channel.

    Their quantizers become ``power_of_two_factor`` of the same bits: one scale, times 1, 2, 4 or 8 for each channel
    (FQ-ViT, arXiv 2111.13824, section 3.2). Put it after ``calibrate``, and use a placement that quantizes residual
    sums (``psaq``). Convolutional maps keep their quantizers, because their channels are not on the last axis and no
    LayerNorm takes them; ``sites.json`` names them.

    Args:
        observer: chooses the range of all channels.
        batch: images per forward pass.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    replaces_quantizers: ClassVar[bool] = True

    observer: Any = component("observer", default=MinMaxObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses a placement without residual sums, and residual sums of 16 bits."""
        for name in self._sums(model):
            if (bits := model.quantizers[name].bits) > BYTE:
                raise SpdfqError(f"ptf: {name} has {bits} bits; power_of_two_factor has 2 to 8, so leave this step out")

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Replaces and calibrates the quantizers of residual sums.

        Raises:
            SpdfqError: the placement has no residual sums.
            NonFiniteError: a site saw NaN or infinity.
        """
        names = self._sums(model)
        norms = [part for part in model.network.modules() if isinstance(part, (nn.LayerNorm, nn.RMSNorm))]
        widths = {norm.normalized_shape[-1] for norm in norms}
        shapes = {name: model.sites[name].shape for name in names}
        maps = [name for name, shape in shapes.items() if len(shape) == 4 and shape[-1] not in widths]
        model.note("ptf", (f"{name} does not change: its channels are not on the last axis" for name in maps))
        names = [name for name in names if name not in maps]
        for name in names:
            model.replace_quantizer(name, PowerOfTwoFactorQuantizer(bits=model.quantizers[name].bits))
        observe_activations(model, calibration, names, self.batch)
        for name in names:
            model.quantizers[name].freeze(self.observer)

    def _sums(self, model: QuantizedModel) -> list[str]:
        names = [name for name in model.quantizers if model.sites[name].kind == RESIDUAL]
        if not names:
            raise SpdfqError("ptf: no residual sum is quantized; set quantization.placement = 'psaq'")
        return names
