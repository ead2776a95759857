"""A session of onnxruntime on the CPU."""

import warnings
from typing import Any

# otherwise onnxruntime rounds the other factor of a weight to 8 bits by itself, where a file leaves that factor in
# float or gives it 16 bits (operator MatMulNBits)
_FACTORS_AS_THEY_ARE = ("session.qdq_matmulnbits_accuracy_level", "1")
# otherwise the sums of uint8 times int8 saturate at 16 bits on x86 processors without VNNI
_EXACT_SUMS = ("session.x64quantprecision", "1")


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
