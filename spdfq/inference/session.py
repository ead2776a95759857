"""A session of onnxruntime on the CPU."""

import warnings
from functools import cache
from typing import Any

import numpy as np

# otherwise onnxruntime rounds the other factor of a weight to 8 bits by itself, where a file leaves that factor in
# float or gives it 16 bits (operator MatMulNBits)
_FACTORS_AS_THEY_ARE = ("session.qdq_matmulnbits_accuracy_level", "1")
# other kernels, whose sums are exact everywhere; much slower on some processors that need none, such as AMD's with VNNI
_EXACT_SUMS = ("session.x64quantprecision", "1")
# an ONNX file: 8 rows of uint8 values times int8 weights, 64 x 8, all 127 (bytes, since the package onnx is optional)
PRODUCT_FILE = (
    b'\x08\n:\xf4\x04\n$\n\x06values\n\x05codes\x12\x04sums"\rMatMulInteger\x12\x07product*\x90\x04\x08@\x08\x08\x10\x03'
    b"B\x05codesJ\x80\x04" + 512 * b"\x7f" + b"Z\x18\n\x06values\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x08\n\x02\x08@"
    b"b\x16\n\x04sums\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x08\n\x02\x08\x08B\x04\n\x00\x10\x15"
)


def cpu_session(model: str | bytes, **settings: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` that computes what the file says, and logs errors only.

    Warns if it cannot: on x86 processors without VNNI, sums of products may saturate in a file where two weights share
    their zero points, because onnxruntime has no exact kernels for such a file.

    Args:
        model: the path of an ONNX file, or its contents.
        settings: attributes of ``onnxruntime.SessionOptions``.

    Raises:
        Exception: onnxruntime cannot read the model; it has an exception type for each reason.
    """
    if not sums_saturate():
        return _session(model, settings, exact_sums=False)
    try:
        return _session(model, settings, exact_sums=True)
    except Exception:  # onnxruntime has an exception type for each reason
        session = _session(model, settings, exact_sums=False)
    warnings.warn(
        "onnxruntime has no exact kernels for this file on this processor: large sums of integer products saturate; "
        "give each weight its own zero points, or use a processor with VNNI",
        stacklevel=2,
    )
    return session


@cache
def sums_saturate() -> bool:
    """Whether onnxruntime adds products of uint8 and int8 in 16 bits on this processor, as on x86 without VNNI."""
    session = _session(PRODUCT_FILE, {}, exact_sums=False)
    (sums,) = session.run(None, {"values": np.full((8, 64), 255, np.uint8)})
    return bool((sums != 64 * 255 * 127).any())


def _session(model: str | bytes, settings: dict[str, Any], exact_sums: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4 if exact_sums else 3  # the second try tells the error
    options.add_session_config_entry(*_FACTORS_AS_THEY_ARE)
    if exact_sums:
        options.add_session_config_entry(*_EXACT_SUMS)
    for name, setting in settings.items():
        setattr(options, name, setting)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
