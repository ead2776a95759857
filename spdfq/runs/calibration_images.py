"""Write the calibration images of a finished run for other tools."""

from pathlib import Path
from typing import Any

from attrs import asdict

from spdfq.calibration_data import CalibrationImages
from spdfq.errors import reading
from spdfq.runs.finished import finished_recipe, finished_record
from spdfq.synth import SyntheticImages


def export_images(folder: str | Path, to: str | Path) -> dict[str, Any]:
    """Write the calibration images of a finished run as a file of arrays, or as a folder of pictures.

    Args:
        folder: of the run.
        to: as in `spdfq.calibration_data.CalibrationImages.save`: ``FILE.npz``, or a folder for 8-bit PNG pictures.

    Returns:
        ``file`` (``to``), ``images`` (their number), ``size`` (height and width), ``mean``, ``std``, ``source`` (type
        of the run's image source), and ``rounding``: what the pictures lost, ``None`` for a file.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    finished_recipe(folder)
    record = finished_record(folder)
    with reading(Path(folder) / "run.json"):
        mean, std, source = list(record["model"]["mean"]), list(record["model"]["std"]), record["images"]["type"]
    images = SyntheticImages.load(Path(folder) / "synthetic.safetensors").images
    found = CalibrationImages(images=images.float(), mean=mean, std=std, source=str(folder))
    lost = found.save(to)
    return {
        "file": str(to),
        "images": len(found),
        "size": list(found.size),
        "mean": mean,
        "std": std,
        "source": source,
        "rounding": None if lost is None else asdict(lost),
    }
