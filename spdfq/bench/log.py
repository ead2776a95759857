"""A log of a bench without a terminal: a line with the running cells and their stages every 30 seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field

from spdfq.runtime import Advance
from spdfq.runtime.progress import clock

EVERY = 30.0


@define
class LogProgress:
    """A `Progress` that knows which cell and stage is running, and for how long, and prints nothing itself."""

    _cell: str = field(default="", init=False)
    _stage: str = field(default="", init=False)
    _bar: str = field(default="", init=False)
    _started: float = field(factory=time.monotonic, init=False)

    def cell(self, name: str) -> None:
        """Say which cell begins."""
        self._cell, self._stage, self._bar, self._started = name, "", "", time.monotonic()

    def stage(self, number: int, count: int, name: str, *_: Any) -> None:
        """Say which stage begins."""
        self._stage, self._bar = f", stage {number} of {count}, {name}", ""

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Advance]:
        """Count what is done."""
        done = 0

        def advance(steps: int = 1, **_: float) -> None:
            nonlocal done
            done += steps
            self._bar = f": {description} {done}/{total}"

        yield advance
        self._bar = ""

    def line(self) -> str:
        """What is running now."""
        return f"{self._cell}{self._stage}{self._bar}, {clock(time.monotonic() - self._started)}" if self._cell else ""


@contextmanager
def said_every(seconds: float, line: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """Inside the ``with`` block, a thread says a line every so many seconds; an empty one is left out."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(seconds):
            if text := line():
                say(text)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
