"""A lowered network as a program of torch.export, with any number of images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spdfq.errors import ModelError, SpdfqError, first_line, is_out_of_memory
from spdfq.exporters.lowering import Lowered
from spdfq.quantized.model import QuantizedModel
from spdfq.runtime.shared_modules import Hook, own_hooks
from spdfq.teacher import Teacher

_BATCH = 2  # a program traced with one image may hold for one image only


@torch.no_grad()
def exported_program(lowered: Lowered, model: QuantizedModel, teacher: Teacher) -> torch.export.ExportedProgram:
    """The program of a lowered network, after a check that both give the logits of the quantized model.

    Raises:
        ModelError: the network cannot be traced, or computes something else then; the message names the module.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, *teacher.input_size, generator=generator, dtype=torch.float32, device="cpu")
    expected = model(images.to(teacher_device(model))).cpu()
    with _running_module(lowered.network) as running:
        if not torch.equal(lowered(images), expected):
            raise ModelError(f"{teacher.name}: its integers do not give the logits of the quantized model")
        batch = torch.export.Dim("batch", min=1)
        try:
            return torch.export.export(lowered, (images,), dynamic_shapes=({0: batch},), strict=False)
        except SpdfqError:
            raise
        except Exception as error:  # each operator fails with its own error
            if is_out_of_memory(error):
                raise
            place = running[-1] or type(lowered.network).__name__
            raise ModelError(
                f"{teacher.name}: torch.export cannot trace {place} ({first_line(error)}); change that module, or "
                "export with format 'safetensors'"
            ) from error


def teacher_device(model: nn.Module) -> torch.device:
    """Device of a model's parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _running_module(network: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the running modules; after an exception, its last one is where that was raised."""
    running: list[str] = [""]

    def leave(*_: object) -> None:
        running.pop()

    hooks: list[Hook] = []
    for name, module in network.named_modules():
        hooks.append((module.register_forward_pre_hook, lambda *_, name=name: running.append(name)))
        hooks.append((module.register_forward_hook, leave))
    with own_hooks(hooks):
        yield running
