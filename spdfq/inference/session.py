"""A session of onnxruntime on the CPU."""

from typing import Any

_EXACT = {
    # otherwise onnxruntime rounds the other factor of a weight to 8 bits by itself, where a file leaves that factor in
    # float or gives it 16 bits (operator MatMulNBits)
    "session.qdq_matmulnbits_accuracy_level": "1",
    # otherwise the sums of uint8 times int8 saturate at 16 bits on x86 processors without VNNI
    "session.x64quantprecision": "1",
}


def cpu_session(model: str | bytes, **settings: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` that computes what the file says, and logs errors only.

    Args:
        model: the path of an ONNX file, or its contents.
        settings: attributes of ``onnxruntime.SessionOptions``.

    Raises:
        Exception: onnxruntime cannot read the model; it has an exception type for each reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in _EXACT.items():
        options.add_session_config_entry(key, value)
    for name, setting in settings.items():
        setattr(options, name, setting)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
