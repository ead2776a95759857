"""Weights & Biases."""

from typing import ClassVar, Literal

from attrs import define

from spdfq.registry import trackers
from spdfq.trackers.base import Tracked, Tracker


@trackers.register("wandb")
@define(kw_only=True)
class WandbTracker(Tracker):
    """Track a run with Weights & Biases; by default offline, so that nothing leaves the machine.

    The files of an offline run are in ``wandb`` in the run folder; ``wandb sync`` uploads them.

    Args:
        project: the project's name.
        mode: ``offline``, or ``online`` to upload at once, which needs a login.
    """

    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    extra: ClassVar[str] = "wandb"

    project: str = "spdfq"
    mode: Literal["offline", "online"] = "offline"

    def track(self, run: Tracked) -> None:
        """Log losses by iteration, results as the summary, pictures, and the recipe as the configuration."""
        import wandb

        tracked = wandb.init(
            project=self.project, name=run.name, config=run.recipe, dir=str(run.folder), mode=self.mode
        )
        try:
            for step, losses in enumerate(run.steps()):
                tracked.log({f"losses/{name}": value for name, value in losses.items()}, step=step)
            tracked.summary.update(run.values)
            if run.pictures:
                tracked.log({name: wandb.Image(str(path)) for name, path in run.pictures.items()})
        finally:
            tracked.finish()
