"""Starting the shards of a bench on a cluster, as one SLURM array, through submitit."""

import shlex
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spdfq.bench.plan import read_plan
from spdfq.errors import SpdfqError, first_line
from spdfq.extras import require

CLUSTER = "cluster"


def launch(
    source: str, shards: int, *, out: Path | None = None, options: Iterable[str] = (), arguments: Sequence[str] = ()
) -> tuple[Path, list[Any]]:
    """Submit one job for each shard of a bench, which runs ``spdfq bench FILE --shard i/n``.

    Args:
        source: path of the bench file.
        shards: number of jobs.
        out: folder of the bench, which all machines must see; by default ``runs/`` and the file's name.
        options: ``key=value`` pairs for submitit, the value as TOML: ``timeout_min=120``, ``gpus_per_node=1``,
            ``slurm_partition="gpu"``. ``cluster="local"`` starts processes on this machine.
        arguments: further arguments of ``spdfq bench``.

    Returns:
        The folder of the bench, and submitit's jobs in the order of the shards.

    Raises:
        RecipeError: the bench file has mistakes.
        SpdfqError: submitit is not installed, an option is unknown to it, or there is no such cluster.
    """
    require("--launcher submitit", ("submitit",), "cluster")
    import submitit

    plan = read_plan(source)
    folder = out or Path("runs") / plan.name
    given = dict(map(_option, options))
    cluster = given.pop(CLUSTER, None)
    commands = [
        [sys.executable, "-m", "spdfq", "bench", source, "--out", str(folder), "--shard", f"{i}/{shards}", *arguments]
        for i in range(1, shards + 1)
    ]
    try:
        executor = submitit.AutoExecutor(folder=str(folder / "launcher"), cluster=cluster)
        executor.update_parameters(name=f"spdfq-{plan.name}", **given)
        with executor.batch():
            # a command, and not a pickled function: what a job does can be read in its log
            jobs = [executor.submit(submitit.helpers.CommandFunction(command)) for command in commands]
    except (RuntimeError, ValueError, NameError, OSError, submitit.core.utils.FailedSubmissionError) as error:
        raise SpdfqError(f"--launcher submitit: {first_line(error)}; see --launcher-option") from None
    return folder, jobs


def merge_command(source: str, folder: Path) -> str:
    """What to type when all shards are done."""
    return f"spdfq bench merge {shlex.quote(source)} --out {shlex.quote(str(folder))}"


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = (part.strip() for part in text.partition("="))
    try:
        return key, tomllib.loads(f"value = {value}")["value"] if separator and key else None
    except (ValueError, RecursionError):
        raise SpdfqError(f"--launcher-option {text}: expected key=value; text needs quotes: '{key}=\"...\"'") from None
