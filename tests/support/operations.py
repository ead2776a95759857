"""Counts what the dispatcher runs: on an accelerator each operation that is no view is at least one kernel."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations inside the ``with`` block, except those that only return views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    @property
    def total(self):
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        name = func.overloadpacket.__name__
        if not is_view and name != "_unsafe_view":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
