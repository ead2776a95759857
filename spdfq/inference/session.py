"""A session of onnxruntime on the CPU."""

from typing import Any

# otherwise onnxruntime rounds the other factor of a weight to 8 bits by itself, where a file leaves that factor in
# float or gives it 16 bits (operator MatMulNBits)
_FACTORS_AS_THEY_ARE = ("session.qdq_matmulnbits_accuracy_level", "1")


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
    options.add_session_config_entry(*_FACTORS_AS_THEY_ARE)
    for name, setting in settings.items():
        setattr(options, name, setting)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
