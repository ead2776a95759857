"""The float32 ONNX file of a teacher, which other tools quantize."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from spdfq.teacher import Teacher

INPUT = "images"


def export_float(teacher: Teacher, path: Path) -> Path:
    """Write a teacher in float32, for any number of images; returns the path."""
    example = torch.zeros(2, *teacher.input_size)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with contextlib.redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(
            teacher.module.eval(), (example,), dynamo=True, input_names=[INPUT], dynamic_shapes=shapes, verbose=False
        )
    program.save(str(path))
    return path
