"""Parts: sections of a recipe by name, by path, as plain data and as objects."""

import attrs
import pytest

from spdfq.data import FashionMnist
from spdfq.errors import RecipeError
from spdfq.losses import TotalVariationLoss
from spdfq.recipe import Evaluation, Recipe, load_recipe
from spdfq.recipe.parts import Part, load_part
from spdfq.recipe.structure import unstructure
from spdfq.synth import GaussianNoise, OptimizedImages

NOISE = {"type": "gaussian_noise", "images": 2}
BACK_END = load_recipe("quickstart").to_dict()["quantization"]
SPEC = load_recipe("quickstart").quantization


def problems_of(source, wanted, *overrides, **options):
    with pytest.raises(RecipeError) as refused:
        load_part(source, wanted, overrides, **options)
    return refused.value.problems


def test_a_part_has_the_fields_of_a_recipe():
    fields = [[field.name for field in attrs.fields(cls)] for cls in (Part, Recipe)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize(
    "source",
    [
        "images/gaussian_noise",
        {"extends": ["images/gaussian_noise"]},
        {"synthesis": {"type": "gaussian_noise", "images": 32}},
        {"synthesis": "gaussian_noise"},
        {"type": "gaussian_noise"},
        GaussianNoise(),
        load_recipe("gaussian_noise"),
    ],
    ids=["name", "extends", "sections", "short", "section", "object", "recipe"],
)
def test_a_source_of_images_is_found_in_every_form(source):
    assert load_part(source, "synthesis").synthesis == GaussianNoise(images=32)
    changed = load_part(source, "synthesis", ["synthesis.images=4"], seed=3)
    assert (changed.synthesis, changed.seed) == (GaussianNoise(images=4), 3)


@pytest.mark.parametrize("source", [{"quantization": BACK_END}, BACK_END, SPEC], ids=["sections", "section", "object"])
def test_a_back_end_is_found_in_every_form(source):
    assert unstructure(load_part(source, "quantization").quantization) == BACK_END
    changed = load_part(source, "quantization", ["quantization.weights.bits=5", "seed=7"])
    assert (changed.quantization.weights.bits, changed.seed) == (5, 7)


def test_a_file_may_be_a_part(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('extends = ["images/gaussian_noise"]\nsynthesis.images = 3\n')
    for source in (path, str(path)):
        assert load_part(source, "synthesis").synthesis.images == 3
    assert problems_of(path, "quantization") == [
        f"{path}: has no quantization section, only synthesis; give one such as 'backends/repq'"
    ]


def test_an_evaluation_is_a_section_too():
    spec = Evaluation(dataset=FashionMnist(limit=5), batch=2)
    for source in (spec, {"dataset": {"type": "fashion_mnist", "limit": 5}, "batch": 2}):
        assert load_part(source, "evaluation").evaluation == spec


def test_an_object_is_used_as_it_is():
    class Own(TotalVariationLoss):
        """Not registered."""

    source = OptimizedImages(losses={"own": Own()})
    assert load_part(source, "synthesis").synthesis is source
    assert load_part(SPEC, "quantization", seed=4).quantization is SPEC


@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        ("backends/repq", "synthesis", "backends/repq: has no synthesis section, only quantization; give one such as"),
        ("images/spdfq", "quantization", "images/spdfq: has no quantization section, only synthesis; give one such as"),
        ("models/vit_fmnist", "synthesis", "models/vit_fmnist: has no synthesis section, only model, evaluation; give"),
        (SPEC, "synthesis", "recipe: has no synthesis section, only quantization; give one such as 'images/spdfq'"),
        ({"seed": 1}, "synthesis", "recipe: has no synthesis section, only others; give one such as 'images/spdfq'"),
        ({}, "synthesis", "recipe: is empty"),
        ({"type": "gaussian_noise", "imags": 2}, "synthesis", "synthesis.imags: unknown key; did you mean 'images'?"),
        ({"synthesys": NOISE}, "synthesis", "synthesys: unknown key; did you mean 'synthesis'?"),
        (["images/spdfq"], "synthesis", "recipe: expected a Recipe, a name, a .toml path or a dict, got ['images/spd"),
        (GaussianNoise, "synthesis", "recipe: expected a Recipe, a name, a .toml path or a dict, got the class Gauss"),
        ("", "synthesis", "recipe: the name is empty"),
        ("images/spdf", "synthesis", "images/spdf: no shipped recipe of that name; did you mean 'images/spdfq'?"),
    ],
    ids=str,
)
def test_what_has_no_such_section_is_one_line(source, wanted, message):
    (problem,) = problems_of(source, wanted)
    assert problem.startswith(message)
    assert "\n" not in problem


@pytest.mark.parametrize("seed", [-1, True, 1.0, "1"])
def test_a_seed_that_is_none_is_refused_for_parts_and_objects(seed):
    for source in ("images/gaussian_noise", GaussianNoise()):
        (problem,) = problems_of(source, "synthesis", seed=seed)
        assert problem.startswith("seed: ")


def test_a_student_and_a_budget_exclude_each_other_in_a_part_too():
    data = {"extends": ["images/psaq_vit_v2", "backends/repq"], "quantization": {"budget": {"weights": 4.0}}}
    (problem,) = problems_of(data, "synthesis")
    assert problem.startswith("quantization.budget: needs finished images, but synthesis.student")


@pytest.mark.parametrize("overrides", ["synthesis.images=4", {"synthesis.images": 4}, [4], None, 4])
def test_overrides_are_a_list_of_strings(overrides):
    expected = r"^overrides: expected a list of 'key=value' strings, \['synthesis.images=4'\], got "
    for load in (
        lambda: load_part("images/gaussian_noise", "synthesis", overrides),
        lambda: load_recipe("spdfq", overrides),
    ):
        with pytest.raises(RecipeError, match=expected) as refused:
            load()
        assert len(refused.value.problems) == 1


def test_overrides_may_come_from_a_generator():
    overrides = (f"synthesis.images={count}" for count in (4, 5))
    assert load_recipe("gaussian_noise", overrides).synthesis.images == 5
