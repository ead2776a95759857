"""Contracts of everything registered: a component, built-in or plugged in, is tested by being registered."""

import re

import pytest
from support.registered import made

from spdfq.errors import SpdfqError
from spdfq.recipe.describe import describe
from spdfq.recipe.structure import structure, unstructure
from spdfq.registry import REGISTRIES, registry

BUILT_IN = {
    "loss": {
        "attention_entropy",
        "attention_prior",
        "cross_entropy",
        "frequency_consistency",
        "head_similarity",
        "masked_attention_alignment",
        "patch_contrast",
        "patch_similarity_entropy",
        "soft_cross_entropy",
        "teacher_student_discrepancy",
        "total_variation",
    },
    "prior": {"gaussian_mixture", "laplace"},
    "sampler": {"multi_semantic", "whole_image"},
    "target": {"none", "one_hot", "soft_label"},
    "augmentation": {
        "channel_offset",
        "color_jitter",
        "flip",
        "high_pass",
        "jitter",
        "low_pass",
        "random_resized_crop",
    },
    "source": {"gaussian_noise", "optimize", "real"},
    "optimizer": {"adam", "adamw"},
    "schedule": {"constant", "warmup_cosine"},
    "quantizer": {"adaptive_log", "dual_uniform", "log2", "log_sqrt2", "power_of_two_factor", "shift_uniform_log2"}
    | {"twin_uniform", "uniform"},
    "observer": {"grid_mse", "minmax", "percentile_mse", "progressive", "running_minmax"},
    "step": {"adalog", "adaround", "blockwise", "calibrate", "distill", "global_local", "ptf", "repq", "ridge"},
}

everything = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in BUILT_IN for name in registry(kind).names()]
)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_built_in_names_are_registered(kind):
    assert set(registry(kind).names()) >= BUILT_IN[kind]


@everything
def test_a_component_says_what_it_is_and_what_its_fields_mean(kind, name):
    entry = registry(kind).entry(name)
    assert entry.summary.endswith(".")
    assert vars(entry.component).get("__doc__"), "a docstring of its own, not its parent's"
    assert entry.paper is None or re.fullmatch(r"arXiv:\d{4}\.\d{5}|arXiv:\d{4}\.\d{4}", entry.paper)
    undocumented = [told.name for told in describe(entry.component) if not told.doc]
    assert undocumented == []


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in REGISTRIES for name in registry(kind).names()])
def test_a_component_made_in_python_refuses_a_value_of_the_wrong_type_in_one_line(kind, name):
    cls = registry(kind).get(name)
    for told in describe(cls):
        for wrong in (object(), cls):
            with pytest.raises(SpdfqError) as caught:
                cls(**{told.name: wrong})
            (line,) = [line for line in str(caught.value).splitlines() if not line.endswith(": is required")]
            assert line.startswith(f"{cls.__name__}.{told.name}: expected ")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in REGISTRIES for name in registry(kind).names()])
def test_a_component_made_in_python_refuses_an_unknown_key(kind, name):
    with pytest.raises(SpdfqError, match=r"\.qqq: unknown key \(keys: ") as caught:
        registry(kind).get(name)(qqq=1)
    assert len([line for line in str(caught.value).splitlines() if not line.endswith(": is required")]) == 1


@everything
def test_a_component_written_as_a_recipe_reads_back_the_same(kind, name):
    component = made(kind, name)
    table = unstructure(component, kind)
    assert table.pop("type") == name
    problems = []
    again = structure(type(component), table, kind, problems)
    assert problems == []
    assert unstructure(again, kind) == {"type": name, **table}
