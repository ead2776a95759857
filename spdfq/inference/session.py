"""A session of onnxruntime on the CPU."""

from typing import Any


def cpu_session(model: str | bytes, **settings: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` that logs errors only.

    Args:
        model: the path of an ONNX file, or its contents.
        settings: attributes of ``onnxruntime.SessionOptions``.

    Raises:
        Exception: onnxruntime cannot read the model; it has an exception type for each reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, setting in settings.items():
        setattr(options, name, setting)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
