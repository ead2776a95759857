"""Two uniform grids: one for the columns that hold most of the outliers, one for all other columns."""

from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from einops import rearrange
from torch import Tensor

from spdfq.errors import DataError, SpdfqError
from spdfq.quantizers.base import Parameters
from spdfq.quantizers.observers import MinMaxObserver, Observer
from spdfq.quantizers.option_checks import check_bits
from spdfq.quantizers.product import Product
from spdfq.quantizers.uniform import UniformQuantizer
from spdfq.registry import quantizers

_OUTLIER_SHARE = 0.01


def check_share(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: a share of all columns."""
    if not 0 < value < 1:
        raise ValueError(f"{attribute.name} must lie between 0 and 1, a share of all columns, not {value!r}")


@quantizers.register("dual_uniform", paper="arXiv:2407.06794")
@define(eq=False, slots=False, kw_only=True)
class DualUniformQuantizer(UniformQuantizer):
    """Two ``uniform`` grids, one for the columns with most of the outliers and one for the others: for weights.

    A column is an input channel of a weight, a row is an output channel (or the whole tensor, if granularity is
    "tensor"). The outliers of a row are the 1 % of its values of largest magnitude. The columns that hold most of the
    outliers get ranges of their own, so each output channel has two ranges. The ranges are chosen by the error of the
    values only. An integer runtime multiplies the two groups of columns separately.

    Stores ``scale`` and ``zero_point`` and, for the outlier columns, ``outlier_scale`` and ``outlier_zero_point``, each
    like ``uniform``, and ``outlier`` (uint8 ``[columns]``, 1 for an outlier column).

    Paper: ERQ, arXiv:2407.06794, the dual uniform quantization of its second version; the share and the 1 % are those
    of the public code.

    Args:
        bits: width of a code in bits, 2 to 8.
        symmetric: put zero in the middle of the codes; for weights.
        granularity: what shares one scale, the whole "tensor" or each "channel".
        axis: the channel axis if granularity is "channel", 0 for the output channels of weights.
        columns: the axis of the columns, 1 for the input channels of weights.
        share: the largest share of outlier columns; their number is rounded down.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {
        **{"scale": torch.float32, "zero_point": torch.uint8},
        **{"outlier_scale": torch.float32, "outlier_zero_point": torch.uint8, "outlier": torch.uint8},
    }
    largest: ClassVar[dict[str, int]] = {"outlier": 1}

    bits: int = field(default=4, validator=check_bits)
    columns: int = 1
    share: float = field(default=0.05, validator=check_share)

    def __attrs_pre_init__(self) -> None:
        super().__attrs_pre_init__()
        self._outlier: Tensor | None = None
        self._groups: tuple[UniformQuantizer, ...] = ()

    def axis_of(self, name: str) -> int | None:
        """The axis of the columns for ``outlier``, the channel axis for everything else."""
        return self.columns if name == "outlier" else self.channel_axis

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Collects extremes and samples of both groups of columns; the first batch decides which column is in which."""
        rows = self._rows(x.detach().float())
        self._check_values(rows, *rows.aminmax(dim=1))
        axis = self._axis(x, self.columns)
        if self._outlier is None:
            self._outlier = self._outlier_columns(x.detach().float(), axis)
            self._groups = tuple(self._uniform() for _ in range(2))
        for wanted, group in enumerate(self._groups):
            chosen = x.index_select(axis, (self._outlier == wanted).nonzero()[:, 0])
            if chosen.numel():
                group.observe(chosen)

    @torch.no_grad()
    def freeze(self, observer: Observer | None = None, product: Product | None = None) -> None:
        """Fixes the ranges of both groups like `Quantizer.freeze`; ``product`` is not used."""
        if self._outlier is None:
            raise SpdfqError(f"{self} has observed nothing: call observe(x) with calibration data before freeze()")
        usual, outlying = (self._ranges(group, observer or MinMaxObserver()) for group in self._groups)
        usual, outlying = usual or outlying, outlying or usual
        outliers = {f"outlier_{name}": tensor for name, tensor in outlying.items()}
        self._store(usual | outliers | {"outlier": self._outlier})
        self._outlier, self._groups = None, ()

    def step(self, parameters: Parameters) -> Parameters:
        """Scale and zero point of each channel and column."""
        if "outlier" not in parameters:
            return parameters
        outlier = parameters["outlier"] == 1
        return {
            name: torch.where(outlier, parameters[f"outlier_{name}"], parameters[name])
            for name in ("scale", "zero_point")
        }

    def _uniform(self) -> UniformQuantizer:
        """A quantizer for one group of columns."""
        return UniformQuantizer(bits=self.bits, symmetric=self.symmetric, granularity=self.granularity, axis=self.axis)

    @staticmethod
    def _ranges(group: UniformQuantizer, observer: Observer) -> Parameters:
        """The parameters of a group; none if the group has no columns."""
        if group._statistics is None:
            return {}
        group.freeze(observer)
        return group.tensors()

    def _outlier_columns(self, x: Tensor, axis: int) -> Tensor:
        """Which columns have most of the outliers, uint8 ``[columns]``."""
        count, channel = x.shape[axis], None if self.channel_axis is None else self._axis(x, self.channel_axis)
        if channel == axis:
            raise DataError(f"{self} has its channels on the axis of its columns; set another axis or columns")
        mask, wanted = torch.zeros(count, dtype=torch.uint8, device=x.device), int(self.share * count)
        if wanted:
            # the columns last, so that a position in a row, modulo their number, is a column
            moved = x.movedim(axis, -1)[None] if channel is None else x.movedim((channel, axis), (0, -1))
            rows = rearrange(moved, "rows ... -> rows (...)").abs()
            large = rows.topk(max(round(_OUTLIER_SHARE * rows.shape[1]), 1), dim=1).indices % count
            outliers = large.flatten().bincount(minlength=count)
            chosen = outliers.topk(wanted).indices
            mask[chosen] = (outliers[chosen] > 0).to(torch.uint8)
        return mask
