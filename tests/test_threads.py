"""Several Python threads use one model at once; each gets what it would get alone, and nothing stays behind."""

import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import backends
from support.teachers import RUNTIME, SIDE, recipe, tiny_teacher
from torch import nn

from spdfq.attention import module_names, record_attention
from spdfq.backends import quantize
from spdfq.runtime.runtime import own_threads
from spdfq.runtime.shared_modules import copied, held, own_hooks
from spdfq.synth import TokenPruning

THREADS = 4


@pytest.fixture(autouse=True)
def impatient():
    """Threads take turns after microseconds instead of milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work, threads=THREADS):
    """What ``work(number)`` returns in each of several threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def batch(seed, count=2):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def state(module):
    """Everything a forward pass might change in a module."""
    flags = [(part.training, getattr(part, "fused_attn", None)) for part in module.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    return flags, hooks, [parameter.requires_grad for parameter in module.parameters()]


def test_200_calls_of_a_quantized_model_from_several_threads():
    model = quantize(tiny_teacher(), batch(9), backends.back_end(), RUNTIME)
    images = [batch(seed, 1) for seed in range(3)]
    alone, before = [model(part) for part in images], state(model)

    def calls(thread):
        return Counter(
            torch.equal(model(images[call % 3]), alone[call % 3]) for call in range(thread, thread + 200 // THREADS)
        )

    assert sum(at_once(calls), Counter()) == {True: 200}
    assert state(model) == before


@pytest.mark.parametrize("changes", [{}, {"pruning": TokenPruning(at=(1, 2))}], ids=["plain", "pruning"])
def test_synthesis_from_one_teacher_in_several_threads(changes):
    teacher, spec = tiny_teacher(), recipe(iterations=4, images=2, **changes)
    teacher.module.train()
    before = state(teacher.module)
    alone = spec.synthesize(teacher, RUNTIME).images
    for images in at_once(lambda _: spec.synthesize(teacher, RUNTIME).images):
        assert torch.equal(images, alone)
    assert state(teacher.module) == before


def test_quantization_of_one_teacher_in_several_threads():
    teacher, images = backends.teacher("vit"), backends.images()
    steps = "quantization.steps=[{type='calibrate'}, {type='blockwise', iterations=2}, {type='distill', iterations=2}]"
    for part in teacher.module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    before = state(teacher.module)

    def logits(_):
        model = quantize(teacher, images, backends.back_end(steps), backends.RUNTIME)
        assert set(state(model)[1]) == {0}
        return model(images)

    alone = logits(0)
    assert all(torch.equal(each, alone) for each in at_once(logits, 3))
    assert state(teacher.module) == before


def test_each_thread_records_its_own_calls():
    model, meet = tiny_teacher().module, threading.Barrier(2)

    def record(thread):
        with record_attention(model) as found:
            meet.wait()
            model(batch(thread, 1 + thread))
            meet.wait()
        return found

    for thread, found in enumerate(at_once(record, 2)):
        assert found.names == ["blocks.0.attn", "blocks.1.attn"]
        with record_attention(model) as alone:
            model(batch(thread, 1 + thread))
        for ours, theirs in zip(found.class_attention, alone.class_attention, strict=True):
            assert torch.equal(ours, theirs)


def test_calls_of_other_threads_are_not_seen():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    seen = []
    with module_names(model) as names:
        model[0].register_forward_hook(lambda *_: seen.append(list(names)))
        at_once(lambda _: model(torch.ones(1)))
        model(torch.ones(1))
    assert seen == [[]] * THREADS + [[""]]


def test_a_quantized_model_inside_the_forward_pass_of_another_and_inside_a_recording():
    model = quantize(tiny_teacher(), batch(9), backends.back_end(), RUNTIME)
    outer = nn.Sequential(model)
    alone, before = model(batch(0)), state(outer)
    with record_attention(outer) as record:
        assert torch.equal(outer(batch(0)), alone)
    assert record.names == [f"0.network.blocks.{block}.attn" for block in (0, 1)]
    assert state(outer) == before


def test_a_copy_has_no_hook_of_a_forward_pass():
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    with own_hooks([(model[0].register_forward_hook, print), (model.register_forward_pre_hook, print)]):
        twin = copied(model)
    assert [len(twin[0]._forward_hooks), len(twin._forward_pre_hooks)] == [1, 0]


def test_the_last_holder_of_an_attribute_restores_it():
    module = nn.ReLU()
    first, second = (held([(module, "training", False)]) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not module.training
    second.__exit__(None, None, None)
    assert module.training


def test_an_attribute_that_cannot_be_set_leaves_the_others_as_they_were():
    module = nn.ReLU()
    with pytest.raises(AttributeError), held([(module, "training", False), (module, "nothing", 1)]):
        pass
    assert module.training


def test_overlapping_calls_restore_the_number_of_cpu_threads():
    before, calls = torch.get_num_threads(), [own_threads(), own_threads()]
    for call in calls:
        call.__enter__()
        torch.set_num_threads(before + 1)
    for call in calls:
        call.__exit__(None, None, None)
    assert torch.get_num_threads() == before
