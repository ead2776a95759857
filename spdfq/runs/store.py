"""Finished stages, kept under a key of everything they depend on and shared by all runs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from attrs import define, field, frozen
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from spdfq.errors import DataError, SpdfqError
from spdfq.runtime.ranks import Ranks

T = TypeVar("T")
STATE = "state"
_DONE = "done"


@frozen
class StageRecord:
    """How a stage of a run came about."""

    seconds: float
    reused: bool
    key: str


@define
class Store:
    """A folder of finished stages.

    Args:
        root: the folder.
        fresh: do finished and begun stages anew.
        ranks: the processes that share the work; rank 0 keeps the store.
    """

    root: Path
    fresh: bool = False
    ranks: Ranks = field(factory=Ranks)
    records: dict[str, StageRecord] = field(factory=dict, init=False)

    def stage(self, name: str, key: str, make: Callable[[Path], object], load: Callable[[Path], T]) -> T:
        """The result of a stage: loaded where it is finished, made first where it is not.

        ``make(folder)`` writes the result into the folder; what it keeps under ``folder / STATE`` survives a killed
        run and is removed in the end. A second run that wants the same stage waits for the first. Every rank calls
        ``make``; it says itself what rank 0 does alone.

        Raises:
            DataError: a finished stage cannot be read.
        """
        folder = self.root / f"{name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with FileLock(folder.with_suffix(".lock")) if self.ranks.leads else nullcontext():
            reused = self.ranks.first(lambda: self._found(folder))
            if not reused:
                make(folder)
                self.ranks.wait()
                if self.ranks.leads:
                    (folder / _DONE).touch()
                    shutil.rmtree(folder / STATE)
                self.ranks.wait()
        result = _loaded(folder, load)
        self.records[name] = StageRecord(round(time.monotonic() - start, 3), reused, key)
        return result

    @contextmanager
    def unfinished(self, name: str, key: str) -> Iterator[Path]:
        """A folder for the state of work whose result is not kept: it survives a killed run, and nothing else.

        A second run that wants the same folder waits for the first.
        """
        folder = self.root / f"{name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")) if self.ranks.leads else nullcontext():
            try:
                yield folder
                self.ranks.wait()
            except SpdfqError:  # what is wrong may be in the state: after the remedy, begin anew
                shutil.rmtree(folder, ignore_errors=True)
                raise
            if self.ranks.leads:
                shutil.rmtree(folder)

    def _found(self, folder: Path) -> bool:
        """Whether the stage is finished; where it is not, its folder is made ready."""
        if self.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if (folder / _DONE).exists():
            return True
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        return False


def _loaded(folder: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(folder)
    except (SafetensorError, DataError, OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).partition("; ")[0]  # without a remedy of its own
        raise DataError(f"{folder}: a finished stage that is damaged ({said}); delete it, or use --fresh") from None


def store_beside(run_folder: Path, fresh: bool = False, ranks: Ranks | None = None) -> Store:
    """The store of a run: ``SPDFQ_STORE``, or ``.store`` beside the run folder."""
    named = os.environ.get("SPDFQ_STORE")
    return Store(Path(named) if named else run_folder.parent / ".store", fresh, ranks or Ranks())


def lock_folder(folder: Path) -> FileLock:
    """A held lock on a run folder; release it when done.

    Raises:
        SpdfqError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SpdfqError(
            f"{folder}: another process is writing this run; wait for it, or choose another --out"
        ) from None
    return lock
