"""Numbers of several seeds in one table cell."""

from collections.abc import Sequence
from statistics import mean, stdev


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean and the standard deviation; the number alone if there is one."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
