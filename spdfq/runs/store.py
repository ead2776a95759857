"""The store: finished stages, kept under a key of everything they depend on, and shared by all runs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from attrs import define, field, frozen
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from spdfq.errors import DataError, SpdfqError, writing
from spdfq.runtime.ranks import Ranks

T = TypeVar("T")
STATE = "state"
_DONE = "done"


@frozen
class StageRecord:
    """How a run got the result of a stage.

    Args:
        seconds: that it took.
        reused: whether the store had it.
        key: of the stage.
    """

    seconds: float
    reused: bool
    key: str


@define
class Store:
    """A folder of finished stages.

    Args:
        root: the folder.
        fresh: repeat finished stages, and discard the state of unfinished ones.
        ranks: the processes that share the work; rank 0 writes the store.
    """

    root: Path
    fresh: bool = False
    ranks: Ranks = field(factory=Ranks)
    records: dict[str, StageRecord] = field(factory=dict, init=False)

    def stage(self, name: str, key: str, make: Callable[[Path], object], load: Callable[[Path], T]) -> T:
        """Load the result of a finished stage, or make it first.

        ``make(folder)`` writes the result into the folder. What it keeps under ``folder / STATE`` survives a killed run
        and is removed when the stage is finished. A second run of the same stage waits for the first. Every rank calls
        ``make``, which decides what rank 0 does alone.

        Raises:
            DataError: a finished stage cannot be read, or the store cannot be written.
        """
        start = time.monotonic()
        with self._locked(name, key) as folder:
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
        """A folder for the state of work whose result is not kept. It is removed unless the process is killed.

        A second process that needs the same folder waits for the first.

        Raises:
            DataError: the store cannot be written.
        """
        with self._locked(name, key) as folder:
            try:
                yield folder
                self.ranks.wait()
            except SpdfqError:  # the state may be the cause, so the next call starts without it
                shutil.rmtree(folder, ignore_errors=True)
                raise
            if self.ranks.leads:
                shutil.rmtree(folder)

    @contextmanager
    def _locked(self, name: str, key: str) -> Iterator[Path]:
        """The folder of a stage, locked by the first rank."""
        folder = self.root / f"{name}-{key}"
        lock = FileLock(folder.with_suffix(".lock"))
        with writing(self.root, "make it writable, or name another folder in SPDFQ_STORE"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.leads:
                lock.acquire()
        try:
            yield folder
        finally:
            lock.release()

    def _found(self, folder: Path) -> bool:
        """Whether the stage is finished; if not, prepare its folder."""
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
        cause = str(error).partition("; ")[0]  # without the remedy that it names
        raise DataError(f"{folder}: this finished stage is damaged ({cause}); delete it, or use --fresh") from None


def store_beside(run_folder: Path, fresh: bool = False, ranks: Ranks | None = None) -> Store:
    """The store of a run: the folder that ``SPDFQ_STORE`` names, or ``.store`` beside the run folder."""
    named = os.environ.get("SPDFQ_STORE")
    return Store(Path(named) if named else run_folder.parent / ".store", fresh, ranks or Ranks())


def lock_folder(folder: Path) -> FileLock:
    """Lock a run folder. The caller releases the lock.

    Raises:
        SpdfqError: another process holds it.
        DataError: it cannot be written.
    """
    lock = FileLock(folder / ".lock")
    with writing(folder, "make it writable, or choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise SpdfqError(
                f"{folder}: another process is writing this run; wait for it, or choose another --out"
            ) from None
    return lock
