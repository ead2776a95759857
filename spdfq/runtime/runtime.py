"""What every stage is handed: device, precision, seed streams and a progress bar."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from attrs import field, frozen

from spdfq.errors import SpdfqError
from spdfq.runtime.ranks import Ranks

Precision = Literal["float32", "bfloat16"]
Advance = Callable[..., None]
ALONE = Ranks()


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that is a pure function of the seed and a purpose (names, group, iteration)."""
    text = "/".join(map(str, (seed, *purpose)))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(state)


@contextmanager
def silent(_: str, __: int) -> Iterator[Advance]:
    """A progress bar that shows nothing."""
    yield lambda steps=1, **values: None


@contextmanager
def rich_progress(description: str, total: int) -> Iterator[Advance]:
    """A bar on standard error with rate, time left and live values; ``advance(steps, name=value)`` moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # the live values take what is left of the line: they must not push out the count and the time left
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(description))),
        BarColumn(bar_width=14),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
        TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True, min_width=6)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("[dim]{task.fields[values]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(description, total=total, rate="", values="")

        def advance(steps: int = 1, **values: float) -> None:
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            bar.update(task, advance=steps, rate=f"{speed:.1f}/s" if speed else "", values=shown)

        yield advance


@frozen(kw_only=True)
class Runtime:
    """How things run here, and the seed.

    Args:
        device: where tensors live.
        precision: of the forward passes in synthesis, reconstruction and distillation.
        seed: the recipe's seed.
        progress: ``progress(description, total)`` is a context manager giving ``advance(steps, **values)``.
        ranks: the processes that share the work.
    """

    device: torch.device = field(factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    seed: int = 0
    progress: Callable[[str, int], AbstractContextManager[Advance]] = silent
    ranks: Ranks = ALONE

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator for a purpose; see `generator`."""
        return generator(self.seed, *purpose)

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of the precision."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@contextmanager
def own_threads() -> Iterator[None]:
    """Inside, a runtime may set the number of threads; on exit it is what it was. Decorates functions too."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_runtime(
    spec: Any, seed: int, device: str | None = None, progress: Any = silent, ranks: Ranks = ALONE
) -> Runtime:
    """A runtime for a recipe's ``[runtime]`` section; ``device`` replaces the section's own. See `own_threads`.

    Raises:
        SpdfqError: the device is not there.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    chosen = pick_device(device or spec.device)
    shown = progress if ranks.leads else silent
    precision = pick_precision(spec.precision, chosen)
    return Runtime(device=chosen, precision=precision, seed=seed, progress=shown, ranks=ranks)


def pick_device(name: str) -> torch.device:
    """``auto`` is an accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    if name != "cpu" and (accelerator is None or accelerator.type != name):
        raise SpdfqError(f"runtime.device: this machine has no {name} device; use 'auto' or 'cpu'")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bfloat16 where the device is fast at it."""
    if name == "auto":
        return "bfloat16" if _fast_bfloat16(device) else "float32"
    return "bfloat16" if name == "bfloat16" else "float32"


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(probe())
