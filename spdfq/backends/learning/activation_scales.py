"""The scales of activation quantizers that can be learned."""

from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantizers import Quantizer


def learnable_activation_scales(model: QuantizedModel, prefix: str) -> dict[str, Quantizer]:
    """The activation quantizers with one scale for the whole tensor, at sites that start with ``prefix``.

    The keys are the names of the scales in `QuantizedModel.tensors`.
    """
    return {
        f"{name}_quantizer.scale": quantizer
        for name, quantizer in model.quantizers.items()
        if name.startswith(prefix) and model.sites[name].kind != WEIGHT
        if "scale" in quantizer.stores and quantizer.axis_of("scale") is None
    }
