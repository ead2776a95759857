"""Calibration images outside this library: files of them, and what other tools read. It needs no torch to read."""

from spdfq.calibration_data.images import CalibrationImages as CalibrationImages
from spdfq.calibration_data.pictures import Rounding as Rounding
from spdfq.calibration_data.readers import OnnxRuntimeReader as OnnxRuntimeReader
from spdfq.calibration_data.readers import TorchBatches as TorchBatches

__all__ = ["CalibrationImages", "OnnxRuntimeReader", "Rounding", "TorchBatches"]
