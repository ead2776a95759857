"""Progress of long work: nothing, or bars on standard error."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from attrs import define, field

from spdfq.errors import SpdfqError, shown

Advance = Callable[..., None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def silent(_: str, __: int) -> Iterator[Advance]:
    """A progress bar that shows nothing."""
    yield lambda steps=1, **values: None


def pick_progress(progress: Any) -> Progress:
    """What shows the progress of a call.

    Args:
        progress: ``None`` for bars in a terminal and in a notebook, and nothing elsewhere; true or false for bars or
            nothing everywhere; or a `Progress`.

    Raises:
        SpdfqError: none of these.
    """
    if progress is None:
        progress = in_notebook() or sys.stderr.isatty()
    if isinstance(progress, bool):
        return RichProgress() if progress else silent
    if not callable(progress) or isinstance(progress, type):
        raise SpdfqError(f"progress: expected True, False, None or a RichProgress(), got {shown(progress)}")
    chosen: Progress = progress
    return chosen


def in_notebook() -> bool:
    """Whether the code runs in a cell of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@define
class RichProgress:
    """Bars on standard error with the rate, the time left and live values.

    ``progress(description, total)`` is a context manager. It gives ``advance(steps, name=value, ...)``, which moves
    the bar and shows the values below it. A run calls `stage` at the start of each of its stages.
    """

    label: str = field(default="", init=False)
    _expected: float | None = field(default=None, init=False)
    _later: float | None = field(default=0.0, init=False)
    _started: float = field(factory=time.monotonic, init=False)

    def stage(self, number: int, count: int, name: str, expected: float | None, later: float | None) -> None:
        """Say which stage of a run begins.

        Args:
            number: of the stage, from 1.
            count: how many stages the run has.
            name: of the stage.
            expected: seconds that the stage will take; ``None`` if nothing is known.
            later: seconds that all stages after it will take; ``None`` if one of them is not known.
        """
        self.label = f"stage {number} of {count}, {name}: "
        self._expected, self._later, self._started = expected, later, time.monotonic()

    def time_left(self, bar: float | None) -> str:
        """The time left for the whole run, or for the bar alone outside a run.

        Args:
            bar: seconds left for the bar; ``None`` while its rate is not known.
        """
        rest = max(0.0, self._expected - (time.monotonic() - self._started)) if self._expected is not None else None
        known = [seconds for seconds in (bar, rest) if seconds is not None]
        if not known:
            return ""
        about = "at least " if self._later is None else ""
        return f"{about}{clock(max(known) + (self._later or 0.0))} left"

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Advance]:
        """Show one bar."""
        from rich.console import Group, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column
        from rich.text import Text

        def whole(width: int) -> Column:
            """A column that a narrow terminal does not cut off."""
            return Column(no_wrap=True, min_width=width)

        bar = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            BarColumn(bar_width=14),
            MofNCompleteColumn(table_column=whole(2 * len(str(total)) + 1)),
            TextColumn("{task.fields[rate]}", table_column=whole(7)),
            TextColumn("{task.fields[left]}", table_column=whole(10)),
        )
        task = bar.add_task(f"{self.label}{description}", total=total, rate="", left="")
        shown = Text("", style="dim")  # below the bar, where it wraps: no value is cut off

        def picture() -> RenderableType:
            return Group(bar, shown) if shown.plain else bar

        with _cell(picture) if in_notebook() else _terminal(picture) as draw:

            def advance(steps: int = 1, **values: float) -> None:
                state = bar.tasks[task]
                speed = state.finished_speed or state.speed
                rate = f"{speed:.1f}/s" if speed else ""
                bar.update(task, advance=steps, rate=rate, left=self.time_left(state.time_remaining))
                shown.plain = "   ".join(f"{name}={value:.4g}" for name, value in values.items())
                draw()

            yield advance
            bar.update(task, left="")  # the line stays on the screen, and the time left goes on


@contextmanager
def _terminal(picture: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Draw on standard error, eight times a second; a log gets the last picture alone."""
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(stderr=True)
    with Live(get_renderable=picture, console=console, refresh_per_second=8):
        yield lambda: None
    if isinstance(picture(), Group) and not console.is_terminal:
        console.print()  # rich leaves the last line of a log open


@contextmanager
def _cell(picture: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Draw below a notebook's cell, as plain text, which every notebook shows."""
    from IPython.display import display
    from rich.console import Console

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    drawn = 0.0

    def draw(pause: float = 0.25) -> None:
        nonlocal drawn
        if time.monotonic() - drawn >= pause:
            text = io.StringIO()
            Console(file=text, width=100, force_jupyter=False).print(picture())
            handle.update({"text/plain": text.getvalue().rstrip()}, raw=True)
            drawn = time.monotonic()

    yield draw
    draw(pause=0.0)


def clock(seconds: float) -> str:
    """A duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
