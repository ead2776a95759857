"""The quantized network: which tensors are quantized, where, and the file format it is saved in.

To add a placement, write a new file with a registered class and add one import line here.
"""

from spdfq.quantized.checkpoint import load_quantized as load_quantized
from spdfq.quantized.checkpoint import save_quantized as save_quantized
from spdfq.quantized.model import QuantizedModel as QuantizedModel
from spdfq.quantized.place import place as place
from spdfq.quantized.placements import MatmulInputs as MatmulInputs
from spdfq.quantized.placements import Psaq as Psaq
from spdfq.quantized.placements import WeightsOnly as WeightsOnly
from spdfq.quantized.sites import Site as Site
