"""What a file with integers does not compute as the quantized model does, and widths that it or runtimes change."""

from collections import Counter

from spdfq.exporters.lowering import has_integers
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import OPERANDS, WEIGHT
from spdfq.registry import quantizers as registered

_BYTE, _HALF_BYTE = 8, 4
_WIDE = (
    "are 16-bit integers for phone NPUs (QNN); on a CPU, onnxruntime computes their products in float, and OpenVINO "
    "leaves most of their quantizers out"
)


def container_lines(model: QuantizedModel) -> list[str]:
    """A line for each site that is computed in float, and one for each width that a CPU multiplies as a wider one."""
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
    return lines
