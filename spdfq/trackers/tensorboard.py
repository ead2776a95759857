"""TensorBoard."""

from typing import ClassVar

from attrs import define

from spdfq.recipe import to_toml
from spdfq.registry import trackers
from spdfq.trackers.base import Tracked, Tracker


@trackers.register("tensorboard")
@define(kw_only=True)
class TensorBoardTracker(Tracker):
    """Write the files of TensorBoard: ``tensorboard --logdir runs`` shows all runs.

    Args:
        folder: where the files are written; by default ``tensorboard`` in the run folder.
    """

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"

    folder: str | None = None

    def track(self, run: Tracked) -> None:
        """Write scalars, pictures, and the recipe as text."""
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self.folder or str(run.folder / "tensorboard")) as writer:
            for step, losses in enumerate(run.steps()):
                for name, value in losses.items():
                    writer.add_scalar(f"losses/{name}", value, step)
            for name, value in run.values.items():
                writer.add_scalar(name, value)
            for name, path in run.pictures.items():
                writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
            writer.add_text("recipe", f"```toml\n{to_toml(run.recipe)}```")
