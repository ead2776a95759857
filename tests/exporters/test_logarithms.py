"""Logarithmic quantizers in a file: their tables give the values of the quantizer, bit for bit."""

import onnx_ir as ir
import pytest
import torch
from support import exports  # noqa: F401  exporting is faster then

from spdfq.exporters.logarithms import StoredLogarithm, look_up
from spdfq.exporters.onnx import OPSET, _translations
from spdfq.inference.session import cpu_session
from spdfq.quantizers import AdaptiveLogQuantizer, Log2Quantizer, LogSqrt2Quantizer, ShiftUniformLog2Quantizer
from spdfq.quantizers.log_grid import LogTables

QUANTIZERS = {
    "log2": Log2Quantizer(),
    "log2 of 8 bits": Log2Quantizer(bits=8),
    "log_sqrt2": LogSqrt2Quantizer(bits=3),
    "shift_uniform_log2": ShiftUniformLog2Quantizer(),
    "adaptive_log": AdaptiveLogQuantizer(shift=0.17),
    "adaptive_log, folded": AdaptiveLogQuantizer(shift=0.17, folded=True),
}


@pytest.fixture(scope="module", params=QUANTIZERS)
def quantizer(request):
    """Frozen at an upper end of 0.7."""
    quantizer = QUANTIZERS[request.param]
    quantizer.observe(torch.linspace(0, 0.7, 999))
    quantizer.freeze()
    return quantizer


@pytest.fixture(scope="module")
def x(quantizer):
    """Ordinary and extreme numbers, all values of the quantizer, all edges, and the numbers beside these."""
    tables = quantizer.tables()
    chosen = torch.cat([tables.values, tables.edges * tables.scale]) - quantizer.input_shift
    ends = torch.tensor([torch.inf, -torch.inf])
    chosen = torch.cat([chosen, *(chosen.nextafter(end) for end in ends)])
    extreme = torch.tensor([0.0, -0.0, -1.0, 1e-44, 1e-30, 0.7, 0.71, 3e38, torch.inf, -torch.inf, torch.nan])
    random = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    return torch.cat([chosen, extreme, random, random**20])


def same(a, b):
    return torch.equal(a.nan_to_num(nan=-9), b.nan_to_num(nan=-9))


@pytest.mark.parametrize("how", [LogTables.at, look_up])
def test_stored_tables_give_the_values_of_the_quantizer(quantizer, x, how):
    assert same(StoredLogarithm(quantizer, how)(x), quantizer(x))


def test_the_operators_of_onnx_do_too(quantizer, x):
    program = torch.export.export(StoredLogarithm(quantizer, look_up), (x,))
    done = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=_translations(), verbose=False
    )
    file = cpu_session(ir.to_proto(done.model).SerializeToString())
    (values,) = file.run(None, {file.get_inputs()[0].name: x.numpy()})
    assert same(torch.from_numpy(values), quantizer(x))
