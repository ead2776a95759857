"""Several processes that learn together compute the steps of one. Threads stand for the processes here."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from attrs import evolve, field, frozen
from support.backends import RUNTIME, images, quantized, state_of, taken, teacher

from spdfq.backends import AdaRound, Blockwise, Distill, GlobalLocal
from spdfq.backends.learning import distill, reconstruction
from spdfq.backends.learning.shares import Share
from spdfq.backends.learning.training import take_step
from spdfq.runtime.ranks import Ranks
from spdfq.runtime.runtime import ALONE

COUNT = 7
UNIFORM = 'quantization.softmax={ type = "uniform", bits = 4 }'
STEPS = {
    "blockwise": Blockwise(iterations=6, lr=1e-3, batch=4, drop=0.5, scale_lr=1e-4, fisher=True),
    "adaround": AdaRound(iterations=6, lr=1e-2, batch=2),
    "global_local": GlobalLocal(iterations=6, lr=1e-3, batch=4, guard=True, decay=1.0, suffix_every=2),
    "distill": Distill(iterations=6, lr=1e-3, batch=4, features=1.0, structure=1.0, drop=0.5),
    "distill on all images": Distill(iterations=3, lr=1e-3, batch=8, features=1.0),
}


@frozen(eq=False)
class Room:
    """Where threads meet that stand for ranks."""

    barrier: Barrier
    values: dict = field(factory=dict)


@frozen(eq=False)
class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    room: Room = field(kw_only=True)

    def gathered(self, value):
        self.room.barrier.wait(60)
        self.room.values[self.rank] = value
        self.room.barrier.wait(60)
        values = [self.room.values[rank] for rank in range(self.count)]
        self.room.barrier.wait(60)
        return values

    def first(self, make):
        return self.gathered(make() if self.leads else None)[0]

    def _all_reduce(self, tensor):
        tensor.copy_(torch.stack(self.gathered(tensor.clone())).sum(0))

    def _broadcast(self, tensor):
        tensor.copy_(self.gathered(tensor.clone())[0])


def together(count, work):
    """What each of several ranks returns."""
    room = Room(Barrier(count))

    def guarded(ranks):
        try:
            return work(ranks)
        except BaseException:
            room.barrier.abort()  # otherwise the others wait for this one
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(guarded, [ThreadRanks(rank, count, room=room) for rank in range(count)]))


def learner(name, step):
    """A function that gives the tensors of a small model after a step. The model is made here: threads share a seed."""
    chosen = teacher(name)
    model = quantized(chosen, UNIFORM)

    def learned(ranks=ALONE, folder=None):
        runtime = evolve(RUNTIME, ranks=ranks)
        return state_of(taken(step, model, chosen, images=images(COUNT), runtime=runtime, folder=folder))

    return learned


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("label", STEPS)
def test_processes_learn_what_one_learns(name, label):
    step = STEPS[label]
    before, alone = state_of(quantized(name, UNIFORM)), learner(name, step)()
    learners = [learner(name, step), learner(name, step)]
    first, second = together(2, lambda ranks: learners[ranks.rank](ranks))
    assert any(not alone[key].equal(before[key]) for key in alone)
    for key, expected in alone.items():
        assert first[key].equal(second[key]), key
        if key.endswith("qkv.bias"):
            continue  # attention does not depend on a bias of the keys: its gradient is rounding, which Adam enlarges
        moved = (expected.float() - before[key].float()).abs().max()
        torch.testing.assert_close(first[key], expected, rtol=0, atol=float(1e-2 * moved) + 1e-6)


def test_gradients_that_share_memory_are_added_up_once():
    """As those of a class token and of position embeddings do for one image."""

    def step(ranks):
        first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([first, second], lr=1.0)
        share = Share.of(ranks, torch.tensor([0]), torch.zeros(2, 1))
        take_step(optimizer, (first + second).sum(), share)
        return torch.stack([first, second]).detach()

    for learned in together(2, step):
        assert learned.equal(torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(1, 7), (17, 2)])
def test_a_tensor_that_is_not_split_by_images_is_drawn_for(shape):
    shares = [Share.of(Ranks(rank, 2), slice(None), images(4)) for rank in range(2)]
    for share in shares:
        generator = torch.Generator().manual_seed(0)
        assert share.drawn(torch.Size(shape), generator, torch.device("cpu")).shape == shape


@pytest.mark.parametrize("label", ["global_local", "distill"])
def test_processes_go_on_where_they_were_killed(label, tmp_path, monkeypatch):
    step = STEPS[label]

    def run():
        learners = [learner("vit", step), learner("vit", step)]
        return together(2, lambda ranks: learners[ranks.rank](ranks, tmp_path))

    first, _ = run()
    for module in (reconstruction, distill):
        monkeypatch.setattr(module, "take_step", lambda *_: pytest.fail("a finished part was learned again"))
    for again in run():
        assert all(again[key].equal(first[key]) for key in first)


@pytest.mark.parametrize(("rows", "own"), [([4, 2, 0, 1, 3], [[4, 2], [0, 1], [3]]), ([2, 0], [[2, 0]] * 3)])
def test_a_batch_is_shared_if_it_has_an_image_for_each_process(rows, own):
    shares = [Share.of(Ranks(rank, 3), torch.tensor(rows), images(5)) for rank in range(3)]
    assert [share.own.tolist() for share in shares] == own
    assert sum(share.weight_of_common for share in shares) == (1 if len(rows) == 5 else 3)
    everything = Share.of(Ranks(1, 3), slice(None), images(5))
    assert everything.own.tolist() == [2, 3]
    assert Share.of(Ranks(), slice(None), images(5)).own == slice(None)
