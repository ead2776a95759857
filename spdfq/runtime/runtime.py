"""What every stage is given: device, precision, seeds and a progress bar."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from spdfq.errors import ModelError, SpdfqError, shown
from spdfq.runtime.progress import Progress, silent
from spdfq.runtime.ranks import Ranks

Precision = Literal["float32", "bfloat16"]
ALONE = Ranks()


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that is a pure function of the seed and a purpose (names, group, iteration)."""
    text = "/".join(map(str, (seed, *purpose)))
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(state)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws from U(0, 1): float32 on the CPU, whatever torch's default dtype and device are."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws from N(0, 1): float32 on the CPU, whatever torch's default dtype and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@frozen(kw_only=True)
class Runtime:
    """How things run here, and the seed.

    Args:
        device: where tensors live.
        precision: of the forward passes in synthesis, reconstruction and distillation.
        compile: whether synthesis compiles the teacher's forward pass.
        seed: the recipe's seed.
        progress: ``progress(description, total)`` is a context manager that gives ``advance(steps, **values)``.
        ranks: the processes that share the work.
        announce: is told a line about the work ahead; ``None`` if nobody wants to know.
    """

    device: torch.device = field(factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0
    progress: Progress = silent
    ranks: Ranks = ALONE
    announce: Callable[[str], None] | None = None

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator for a purpose; see `generator`."""
        return generator(self.seed, *purpose)

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of the precision; float32 ends an autocast around it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    @contextmanager
    def own_modes(self) -> Iterator[None]:
        """Autograd without autocast, whatever modes the caller has set (``no_grad``, ``inference_mode``, ``autocast``).

        Raises:
            ModelError: the model computes activations again during the backward pass, which nobody can watch.
        """
        autocasts = [torch.autocast(kind, enabled=False) for kind in ("cpu", self.device.type)]
        with torch.inference_mode(False), torch.enable_grad(), autocasts[0], autocasts[1]:
            try:
                yield
            except CheckpointError:
                raise ModelError(
                    "the model uses gradient checkpointing, which does not keep what is recorded of a forward pass; "
                    "turn it off, for example with module.set_grad_checkpointing(False)"
                ) from None


_calls: list[int] = []
"""For each running call of `own_threads`, the number of CPU threads before the first of them."""


@contextmanager
def own_threads() -> Iterator[None]:
    """Restore the number of CPU threads on exit, so that a runtime may change it inside. Also a decorator."""
    _calls.append(_calls[0] if _calls else torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(_calls.pop())


def make_runtime(
    spec: Any,
    seed: int,
    device: str | torch.device | None = None,
    progress: Any = silent,
    ranks: Ranks = ALONE,
    announce: Callable[[str], None] | None = None,
) -> Runtime:
    """A runtime for a recipe's ``[runtime]`` section; ``device`` replaces the section's own. See `own_threads`.

    Raises:
        SpdfqError: the device is not there.
    """
    chosen = pick_device(spec.device) if device is None else pick_device(device, "device")
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    shown = progress if ranks.leads else silent
    precision = pick_precision(spec.precision, chosen)
    options = {"compile": spec.compile, "seed": seed, "progress": shown, "ranks": ranks}
    options["announce"] = announce if ranks.leads else None
    return Runtime(device=chosen, precision=precision, **options)


def pick_device(name: str | torch.device, key: str = "runtime.device") -> torch.device:
    """``auto`` is an accelerator where there is one.

    Args:
        name: ``auto``, ``cpu``, or the type of the accelerator.
        key: where the name comes from, for errors.

    Raises:
        SpdfqError: the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not isinstance(name, (str, torch.device)) or name == "":
        raise SpdfqError(f"{key}: expected 'auto', 'cpu' or the type of an accelerator, got {shown(name)}")
    wanted, _, index = str(name).partition(":")
    if index:
        raise SpdfqError(f"{key}: leave out ':{index}' of '{name}'; CUDA_VISIBLE_DEVICES={index} chooses the device")
    if wanted == "auto":
        return accelerator or torch.device("cpu")
    if wanted != "cpu" and (accelerator is None or accelerator.type != wanted):
        raise SpdfqError(f"{key}: this machine has no {wanted} device; use 'auto' or 'cpu'")
    return torch.device(wanted)


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
