"""Exporters: files that other software runs or loads, made from a quantized model.

To add a format, write a new file with a registered class and add one import line here.
"""

from spdfq.exporters.base import Exporter as Exporter
from spdfq.exporters.base import Written as Written
from spdfq.exporters.dequantized import DequantizedExporter as DequantizedExporter
from spdfq.exporters.export import Exported as Exported
from spdfq.exporters.export import write_export as write_export
from spdfq.exporters.onnx import OnnxExporter as OnnxExporter
from spdfq.exporters.torch_program import TorchProgramExporter as TorchProgramExporter
