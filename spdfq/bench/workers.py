"""Tasks in several processes: a worker takes one task after the other, and one that dies costs its own task alone."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from attrs import define, field

from spdfq.runtime import Advance, Progress, silent

T = TypeVar("T")
R = TypeVar("R")


@define
class _Worker(Generic[T]):
    process: Any
    connection: Connection
    task: T
    stage: str = ""


@define
class Workers(Generic[T, R]):
    """A pool of processes.

    Args:
        work: does a task; a function of a module, so that a new process can import it. It gets the task and a
            `Progress`.
        jobs: number of processes.
        lost: the result of a task whose process died; it gets the task and the reason.
    """

    work: Callable[[T, Progress], R]
    jobs: int
    lost: Callable[[T, str], R]
    _running: list[_Worker[T]] = field(factory=list, init=False)

    def results(self, tasks: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Each task with its result, as they finish. Leaving the loop ends all processes."""
        waiting = deque(tasks)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs:
                    self._running.append(self._started(waiting.popleft()))
                for connection in wait([worker.connection for worker in self._running]):
                    worker = next(each for each in self._running if each.connection is connection)
                    yield from self._heard(worker, waiting)
        finally:
            for worker in self._running:
                worker.process.kill()
                worker.process.join()
            self._running = []

    def stages(self) -> dict[int, tuple[T, str]]:
        """The task and the stage of each running process, by its id."""
        return {worker.process.pid: (worker.task, worker.stage) for worker in self._running}

    def _started(self, task: T) -> _Worker[T]:
        ours, theirs = get_context("spawn").Pipe()
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        process = get_context("spawn").Process(target=_serve, args=(theirs, self.work, threads), daemon=True)
        process.start()
        theirs.close()
        with suppress(OSError):  # it died at once; `_heard` finds that out, and its task is lost
            ours.send(task)
        return _Worker(process, ours, task)

    def _heard(self, worker: _Worker[T], waiting: deque[T]) -> Iterator[tuple[T, R]]:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):  # an OSError if it died in the middle of a message
            worker.process.join()
            self._running.remove(worker)
            yield worker.task, self.lost(worker.task, _reason(worker.process.exitcode))
            return
        if kind == "stage":
            worker.stage = value
            return
        task, following = worker.task, waiting.popleft() if waiting else None
        try:
            worker.connection.send(following)
        except OSError:  # it died after it sent its result, so another process does the next task
            if following is not None:
                waiting.appendleft(following)
                following = None
        if following is None:
            self._running.remove(worker)
            worker.process.join()
        else:
            worker.task, worker.stage = following, ""
        yield task, value


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; if memory ran out, use fewer --jobs"
    return f"its process ended with exit code {code}"


@define
class _Stages:
    """A `Progress` that shows nothing, and tells the first process which stage begins."""

    connection: Connection

    def stage(self, number: int, count: int, name: str, *_: Any) -> None:
        """Tell the name of the stage."""
        self.connection.send(("stage", f"stage {number} of {count}, {name}"))

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        with silent(description, total) as advance:
            yield advance


def _serve(connection: Connection, work: Callable[[Any, Progress], Any], threads: int) -> None:
    """What a worker does: one task after the other, until there is none or the first process is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while (task := connection.recv()) is not None:
        connection.send(("result", work(task, _Stages(connection))))


def _end_with_parent() -> None:
    """End this process as soon as the first one is gone, so that a killed bench leaves no work behind."""
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)
