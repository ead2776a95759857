"""The teacher's recorded forward pass, compiled by `torch.compile`: one program for each shape of its inputs."""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from attrs import define, field
from torch import Tensor

from spdfq.attention import AttentionRecord
from spdfq.attention.record import RECORDED
from spdfq.errors import SpdfqError, is_out_of_memory
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher

RecordedPass = Callable[..., tuple[Tensor, AttentionRecord]]
_BACKEND = "inductor"
# largest difference from the pass as it is written, relative to the largest number of each tensor
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


@define(eq=False)
class CompiledPasses:
    """Recorded forward passes of a teacher as compiled programs.

    A pass is first run under the recorder and traced, with its hooks and function modes, down to torch's operators.
    The trace is what is compiled.

    Args:
        teacher: for error messages.
        runtime: gives the precision.
    """

    teacher: Teacher
    runtime: Runtime
    _programs: dict[Hashable, "_Program"] = field(factory=dict, init=False)

    def __call__(self, purpose: Hashable, forward: RecordedPass, *inputs: Tensor) -> tuple[Tensor, AttentionRecord]:
        """What ``forward(*inputs)`` returns, differentiable by the first input.

        Args:
            purpose: equal for passes that differ in nothing but their inputs.
            forward: must compute the same for the same inputs.
            inputs: the views ``[n, C, h, w]``, and other tensors.

        Raises:
            SpdfqError: the pass cannot be compiled, or its outputs or gradient differ.
        """
        key = purpose, *(tuple(tensor.shape) for tensor in inputs)
        if key not in self._programs:
            self._programs[key] = self._compiled(forward, inputs)
        return self._programs[key].run(*inputs)

    def _compiled(self, forward: RecordedPass, inputs: tuple[Tensor, ...]) -> "_Program":
        leaves = inputs[0].detach().requires_grad_(), *inputs[1:]
        try:
            program = _Program.of(forward, leaves)
            difference = _difference(forward, program.run, leaves)
        except SpdfqError:
            raise
        except Exception as error:  # torch.compile calls other compilers, which raise anything
            if is_out_of_memory(error):
                raise
            why = f"cannot be compiled ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            raise SpdfqError(f"runtime.compile: {self.teacher.name} {why}; set runtime.compile = false") from error
        if not difference <= TOLERANCES[self.runtime.precision]:
            raise SpdfqError(
                f"runtime.compile: the compiled {self.teacher.name} differs by {difference:.1g} of the largest value; "
                "set runtime.compile = false"
            )
        return program


@contextmanager
def compiled_passes(teacher: Teacher, runtime: Runtime) -> Iterator[CompiledPasses | None]:
    """The compiled passes for a ``with`` block in which they may run; ``None`` if the runtime does not ask for them."""
    if not runtime.compile:
        yield None
        return
    from torch._functorch import config

    with config.patch(donated_buffer=False):  # automatic weights differentiate a pass several times
        yield CompiledPasses(teacher, runtime)


@define(eq=False)
class _Program:
    """A compiled pass, and a record whose tensors it fills in."""

    compiled: Callable[..., list[Tensor]]
    form: AttentionRecord
    lengths: list[int]

    @classmethod
    def of(cls, forward: RecordedPass, inputs: tuple[Tensor, ...]) -> "_Program":
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second

        records: list[AttentionRecord] = []

        def traced(*tensors: Tensor) -> list[Tensor]:
            logits, record = forward(*tensors)
            records.append(record)
            return _flat(logits, record)

        graph = make_fx(traced)(*inputs)
        (record,) = records
        lengths = [len(getattr(record, name)) for name in RECORDED]
        form = copy.copy(record)
        for name in RECORDED:
            setattr(form, name, [])
        return cls(torch.compile(graph, backend=_BACKEND, dynamic=False, fullgraph=True), form, lengths)

    def run(self, *inputs: Tensor) -> tuple[Tensor, AttentionRecord]:
        logits, *tensors = self.compiled(*inputs)
        record = copy.copy(self.form)
        for name, length in zip(RECORDED, self.lengths, strict=True):
            setattr(record, name, tensors[:length])
            tensors = tensors[length:]
        return logits, record


def _flat(logits: Tensor, record: AttentionRecord) -> list[Tensor]:
    return [logits, *(tensor for name in RECORDED for tensor in getattr(record, name))]


def _difference(forward: RecordedPass, compiled: RecordedPass, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference between two passes, in their outputs and in the gradient of the sum of their squares."""
    passes = []
    for each in (forward, compiled):
        outputs = _flat(*each(*inputs))
        total = torch.stack([output.float().square().sum() for output in outputs]).sum()
        passes.append([*outputs, *torch.autograd.grad(total, inputs[0])])
    pairs = zip(*passes, strict=True)
    differences = [(one - other).abs().max() / one.abs().max().clamp(min=1e-30) for one, other in pairs]
    return float(torch.stack(differences).max().detach())
