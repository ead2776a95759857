"""Several processes on one recipe (torchrun): who does what, and what one tells the others."""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from attrs import frozen

T = TypeVar("T")
# the others wait while rank 0 reconstructs
_PATIENCE = timedelta(days=2)


@frozen
class Ranks:
    """The processes that share a run; alone unless `join` said otherwise.

    Args:
        rank: of this process, 0 to ``count - 1``; rank 0 writes and speaks.
        count: how many processes there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items this process does: every ``count``-th one."""
        return items[self.rank :: self.count]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 made, on every rank."""
        if self.count == 1:
            return make()
        import torch.distributed as dist

        told: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(told, src=0)
        result: T = told[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.gathered(None)


def join() -> Ranks:
    """The processes torchrun started, joined into a group; a single one without torchrun.

    gloo carries what ranks tell each other; NCCL stands ready for tensors where there are CUDA devices.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        return Ranks()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        # gloo's threads outlive the interpreter otherwise, and now and then abort a process that has done its work
        atexit.register(_leave)
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """End the group, if it has not ended."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
