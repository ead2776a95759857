"""What a bench would do: the cells that are to run, in their order, and how long they will take."""

from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from spdfq.bench.estimate import seconds_of
from spdfq.bench.row_files import rows_in
from spdfq.bench.run import by_priority, finished, planned


@frozen
class Forecast:
    """What a bench would do.

    Args:
        reused: number of cells that are finished.
        to_run: the names of the others, in the order in which they run, each with its seconds at most; ``None``
            without finished rows.
        jobs: number of processes.
    """

    reused: int
    to_run: dict[str, float | None]
    jobs: int

    @property
    def seconds(self) -> float | None:
        """About how long all cells take at most; ``None`` without finished rows."""
        known = [seconds for seconds in self.to_run.values() if seconds is not None]
        return None if len(known) < len(self.to_run) else sum(known) / min(self.jobs, max(len(known), 1))


def forecast_bench(
    source: str,
    *,
    out: Path | None = None,
    device: str | None = None,
    jobs: int = 1,
    shard: tuple[int, int] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """Check a bench and estimate its time from the finished rows in its folder. Nothing is run or written.

    Arguments and errors are those of `spdfq.bench.run.run_bench`.
    """
    plan, folder, cells = planned(source, out=out, device=device, shard=shard, announce=announce)
    kept, rows = finished(cells, folder, announce), rows_in(folder)
    waiting = [cell for cell in by_priority(plan, cells) if cell.folder.name not in kept]
    return Forecast(len(kept), {c.folder.name: seconds_of(c.combination.values, rows) for c in waiting}, jobs)
