"""A recipe on the bundled ViT as text, all but its images."""

import pytest

from spdfq.errors import RecipeError
from spdfq.recipe import load_recipe

NO_IMAGES = """
[model]
name = "bundled:vit_fmnist"
[quantization]
placement = "matmul_inputs"
weights = { type = "uniform", bits = 4, granularity = "channel" }
activations = { type = "uniform", bits = 4 }
softmax = { type = "log2", bits = 4 }
[[quantization.steps]]
type = "calibrate"
observer = "minmax"
weight_observer = "minmax"
[evaluation]
dataset = "fashion_mnist"
"""


def problems_of(source, *overrides, **options):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, **options)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems
