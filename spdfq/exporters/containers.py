"""What a file with integers does not compute as the quantized model does, and widths that it or runtimes change."""

from collections import Counter

from spdfq.exporters.lowering import has_integers
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import INPUT, OPERANDS, WEIGHT, input_site
from spdfq.registry import quantizers as registered

_BYTE, _HALF_BYTE = 8, 4
_WIDE = (
    "are 16-bit integers for phone NPUs (QNN); on a CPU, onnxruntime computes their products in float, and OpenVINO "
    "leaves most of their quantizers out"
)
ROUNDED = (
    "onnxruntime rounds inputs that are not 8-bit integers to 8 bits where it multiplies them with a weight, unless "
    "session.qdq_matmulnbits_accuracy_level is 1, as it is in spdfq's own sessions"
)
"""What onnxruntime does by itself (operator MatMulNBits) with products that have no integer kernel."""


def container_lines(model: QuantizedModel) -> list[str]:
    """Lines about sites that are computed in float, and about bit-widths that a file or a runtime changes."""
    lines: list[str] = []
    widths: Counter[tuple[bool, int]] = Counter()
    for name, quantizer in model.quantizers.items():
        is_weight, kind = model.sites[name].kind == WEIGHT, registered.label(quantizer)
        if not has_integers(quantizer, model.sites[name].kind):
            stored = "stored in float32" if is_weight else "computed in float"
            product = ", its product in float" if model.sites[name].kind in OPERANDS else ""
            channels = " with a scale for each channel" if quantizer.channel_axis is not None else ""
            lines.append(f"{name}: {kind} of {quantizer.bits} bits{channels} is {stored}{product}")
            continue
        if quantizer.bits not in (_BYTE, _HALF_BYTE) or (quantizer.bits == _HALF_BYTE and not is_weight):
            widths[is_weight, quantizer.bits] += 1
    for (is_weight, bits), count in sorted(widths.items()):
        container = "int4" if is_weight and bits < _HALF_BYTE else "8-bit integers"
        what = "weights" if is_weight else "activations"
        fate = _WIDE if bits > _BYTE else f"are {container} with {2**bits} levels"
        lines.append(f"{count} {what} of {bits} bits {fate}")
    return [*lines, ROUNDED] if _has_other_inputs(model) else lines


def _has_other_inputs(model: QuantizedModel) -> bool:
    """Whether a weight of integers is multiplied with an input that is not 8-bit integers."""
    for name in model.weight_names():
        site = input_site(name)
        if has_integers(model.quantizers[name], WEIGHT) and site in model.sites:
            quantizer = model.quantizers.get(site)
            if quantizer is None or not has_integers(quantizer, INPUT) or quantizer.bits > _BYTE:
                return True
    return False
