"""trackio, the local tracker of Hugging Face."""

from typing import ClassVar

from attrs import define

from spdfq.registry import trackers
from spdfq.trackers.base import Tracked, Tracker


@trackers.register("trackio")
@define(kw_only=True)
class TrackioTracker(Tracker):
    """Track a run with trackio, in a database on this machine: ``trackio show`` opens it.

    The environment variable ``TRACKIO_DIR`` says where the database is.

    Args:
        project: the project's name.
    """

    packages: ClassVar[tuple[str, ...]] = ("trackio",)
    extra: ClassVar[str] = "trackio"

    project: str = "spdfq"

    def track(self, run: Tracked) -> None:
        """Log losses by iteration, then the results, and the recipe as the configuration."""
        import trackio

        trackio.init(project=self.project, name=run.name, config=run.recipe, embed=False)
        try:
            for losses in run.steps():
                trackio.log({f"losses/{name}": value for name, value in losses.items()})
            trackio.log(run.values)
        finally:
            trackio.finish()
