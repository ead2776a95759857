"""Bench files: cells, columns, names, and error messages."""

import pytest
from support.benches import BENCH, bench_files

from spdfq.bench.plan import read_plan
from spdfq.bench.run import check_plan
from spdfq.errors import RecipeError


@pytest.fixture
def write(tmp_path):
    """Write a bench file beside its parents and give its path."""
    return bench_files(tmp_path)


def problems(path):
    with pytest.raises(RecipeError) as raised:
        read_plan(path)
    return raised.value.problems


def test_the_cells_are_the_product_of_the_axes(write):
    plan = read_plan(write())
    assert plan.name == "bits"
    assert [combination.values for combination in plan.combinations] == [
        {"images": images, "quantization.weights.bits": bits} for images in ("noise", "optimized") for bits in (3, 4)
    ]
    assert [combination.slug for combination in plan.combinations] == [
        "noise-weights.bits=3",
        "noise-weights.bits=4",
        "optimized-weights.bits=3",
        "optimized-weights.bits=4",
    ]
    assert [c.data["quantization"]["weights"]["bits"] for c in plan.combinations] == [3, 4, 3, 4]
    assert plan.combinations[3].data["synthesis"]["losses"] == {"cross_entropy": {}}


def test_parents_merge_over_the_base_in_the_order_of_the_axes(write, tmp_path):
    (tmp_path / "few.toml").write_text("[synthesis]\nimages = 2\n")
    text = BENCH.replace("[keys]", 'count = [[], ["few.toml"], ["few.toml", "base.toml"]]\n[keys]')
    plan = read_plan(write(text))
    assert [c.values["count"] for c in plan.combinations[::2]] == ["base", "few", "few + base"] * 2
    assert [c.data["synthesis"]["images"] for c in plan.combinations[::2]] == [4, 2, 2] * 2


def test_dotted_keys_need_no_quotes(write):
    assert read_plan(write(BENCH.replace('"quantization.weights.bits"', "quantization.weights.bits"))) == read_plan(
        write()
    )


def test_columns_are_the_shortest_tails_that_tell_keys_apart(write):
    keys = ("quantization.steps.0.observer.bits", "quantization.steps.0.batch", "x.weights.bits")
    text = BENCH + "".join(f'"{key}" = [1, 2]\n' for key in keys)
    columns = [axis.column for axis in read_plan(write(text)).axes]
    assert columns == ["images", "quantization.weights.bits", "observer.bits", "steps.0.batch", "x.weights.bits"]


def test_slugs_stay_distinct_where_readable_text_does_not(write):
    text = BENCH.replace("[3, 4]", "[3]") + "\"model.checkpoint\" = ['a b', 'a/b']\n"
    slugs = [combination.slug for combination in read_plan(write(text)).combinations]
    assert len(set(slugs)) == 4
    assert all(slug.startswith(("noise-model.checkpoint=a_b-", "optimized-")) for slug in slugs)


def test_what_the_base_itself_says_stays_where_a_part_says_nothing_else(tmp_path):
    (tmp_path / "own.toml").write_text(
        """
        [base]
        extends = ["quickstart"]
        [base.synthesis]
        group = 8
        images = 16
        [base.quantization]
        gelu = { type = "uniform", bits = 8 }
        [parents]
        images = ["images/gaussian_noise", "images/spdfq"]
        backend = ["backends/repq", "backends/blockwise"]
        """
    )
    cells = {combination.slug: combination.data for combination in read_plan(str(tmp_path / "own.toml")).combinations}
    assert all(data["quantization"]["gelu"]["bits"] == 8 for data in cells.values())
    assert cells["spdfq-repq"]["synthesis"]["group"] == 8
    assert cells["spdfq-repq"]["synthesis"]["images"] == 32  # which the part says
    assert "group" not in cells["gaussian_noise-repq"]["synthesis"]


def test_a_value_of_the_base_that_a_part_replaces_is_told_with_both_values(write, tmp_path):
    (tmp_path / "images/few.toml").write_text("[synthesis]\ntype = 'optimize'\nimages = 2\nlosses.cross_entropy = {}\n")
    (tmp_path / "wide.toml").write_text("quantization.weights.bits = 8\nevaluation.batch = 9\nseed = 0")
    text = """
[base]
extends = ["base.toml", "images/optimized.toml"]
[base.synthesis]
images = 3
group = 8
[base.quantization]
weights.bits = 6
activations.bits = 6
[base.evaluation]
batch = 9
[parents]
images = ["images/noise.toml", "images/few.toml"]
bits = [[], "wide.toml"]
[keys]
quantization.activations.bits = [4]
"""
    plan = read_plan(write(text))
    assert plan.warnings == (
        "base.synthesis.images = 3: is not used with images = noise, which sets 4; to set it in every cell, give "
        "keys.synthesis.images = [3]",
        "base.synthesis.group = 8: is not used with images = noise, which has another type of synthesis; set it in a "
        "part of your own where it is meant",
        "base.quantization.weights.bits = 6: is not used with bits = wide, which sets 8; to set it in every cell, give "
        "keys.quantization.weights.bits = [6]",
        "base.synthesis.images = 3: is not used with images = few, which sets 2; to set it in every cell, give "
        "keys.synthesis.images = [3]",
    )
    assert [c.data["synthesis"]["images"] for c in plan.combinations] == [4, 4, 2, 2]
    everywhere = read_plan(write(text + "synthesis.images = [3]\n"))
    assert [c.data["synthesis"]["images"] for c in everywhere.combinations] == [3] * 4
    assert not any("synthesis.images" in line for line in everywhere.warnings)
    assert read_plan(write()).warnings == ()
    assert [line for line in check_plan(plan) if line.startswith("base.")] == list(plan.warnings)


def test_keys_beside_a_type_are_not_lost_to_it(write):
    keys = '"quantization.softmax.bits" = [2, 8]\n"quantization.softmax.type" = ["uniform", "log2"]'
    text = BENCH.replace('"quantization.weights.bits" = [3, 4]', keys)
    cells = [combination.data["quantization"]["softmax"] for combination in read_plan(write(text)).combinations]
    expected = [{"type": name, "bits": bits} for bits in (2, 8) for name in ("uniform", "log2")]
    assert cells == [*expected, *expected]


def test_all_mistakes_of_a_bench_file_are_told_at_once(write):
    text = """
seeds = [0, 0]
[base]
extends = ["nowhere.toml"]
seed = 7
[parents]
images = []
backend = ["nothing_like_it"]
model = "base.toml"
count = [1]
[keys]
seed = [1, 2]
"quantization.weights.bits" = [3, 3]
"model.name" = "x"
count = [1]
"""
    found = problems(write(text))
    assert [problem.partition(": ")[0] for problem in found] == [
        "base",
        "base.seed",
        "seeds",
        "parents.images",
        "parents.backend",
        "parents.model",
        "parents.count",
        "keys.seed",
        "keys.quantization.weights.bits",
        "keys.model.name",
        "keys.count",
    ]
    assert "seeds: contains 0 more than once" in found
    assert "parents.images: is empty; give at least one value" in found
    assert "keys.quantization.weights.bits: contains 3 more than once" in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sedes = [1]", "sedes: unknown key; did you mean 'seeds'?"),
        ("seeds = [-1]", "seeds: "),
        ("seeds = 3", "seeds: expected an array, got 3"),
        ("schema = 2", "schema: "),
        ("base = [", "not valid TOML"),
        ("seed = 1\n[model]", "is a recipe or part of a recipe; name it under"),
        (
            "[keys]\nquantization.weights.bits = [1979-05-27]",
            "keys.quantization.weights.bits: a date is not a recipe value",
        ),
        ("[base]\nseeds = []\n[keys]\nseeds.5.x = [1, 2]", "keys.seeds.5.x: '5' is not a position of this list"),
        ("[base]\nmodel = 3\n[keys]\nmodel.name = ['a']", "keys.model.name: 'model' is a value and has no keys"),
    ],
)
def test_a_mistake_in_a_bench_file_is_one_line(text, problem, write):
    (found,) = problems(write(text))
    assert problem in found
