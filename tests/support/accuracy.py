"""Evaluations that are stopped on the way."""

from spdfq.evaluation.accuracy import logits_over
from spdfq.recipe import Evaluation
from spdfq.runtime import Runtime

BATCH = 2


def evaluated(model, owner, dataset, batch=3, folder=None, **options):
    return logits_over(model, owner, Evaluation(dataset=dataset, batch=batch), Runtime(**options), "fp", folder)


def stopping(owner, batches, stop):
    """The teacher's network, stopped before it sees another batch than the first so many."""
    left = iter(range(batches))
    return owner.module.register_forward_pre_hook(lambda *_: None if next(left, None) is not None else stop())
