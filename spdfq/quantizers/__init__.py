"""Quantizers map a tensor to its quantized self; observers choose the range they work in."""

from spdfq.quantizers.base import Quantizer
from spdfq.quantizers.log2 import Log2Quantizer
from spdfq.quantizers.observers import GridMseObserver, MinMaxObserver, Observer, PercentileMseObserver
from spdfq.quantizers.uniform import UniformQuantizer

__all__ = [
    "GridMseObserver",
    "Log2Quantizer",
    "MinMaxObserver",
    "Observer",
    "PercentileMseObserver",
    "Quantizer",
    "UniformQuantizer",
]
