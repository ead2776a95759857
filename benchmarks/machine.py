"""The description of the machine that every benchmark prints."""

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from spdfq.runs.provenance import device_name, git_commit, versions


def about(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, load before the benchmark, versions, commit, and whether the library has changed since then."""
    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "commit": git_commit(),
        "library_changed_since": _changed(),
    }


def _changed() -> bool | None:
    library = Path(__file__).parents[1] / "spdfq"
    asked = subprocess.run(["git", "status", "--porcelain", "."], cwd=library, capture_output=True, text=True)
    return bool(asked.stdout.strip()) if asked.returncode == 0 else None
