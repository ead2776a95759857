"""Recipes: strict reading, overriding, and the resolved copy that reads back as the same recipe."""

import copy
import hashlib

import attrs
import pytest
from support.recipes import problems_of

from spdfq.errors import RecipeError
from spdfq.recipe import Recipe, digest, load_recipe, resolve, shipped, to_toml
from spdfq.recipe.files import is_complete
from spdfq.recipe.structure import structure

OPTIMIZE = {
    "type": "optimize",
    "images": 8,
    "optimizer": {"type": "adam", "lr": 0.1, "betas": [0.5, 0.9]},
    "sampler": {"type": "multi_semantic", "max_patches": 3},
    "target": "soft_label",
    "losses": {"soft_cross_entropy": {}, "attention_prior": {"weight": "auto", "prior": "laplace"}},
}
BASE = {
    "model": {"name": "bundled:vit_fmnist"},
    "synthesis": OPTIMIZE,
    "quantization": {
        "placement": "matmul_inputs",
        "weights": {"type": "uniform", "bits": 4, "granularity": "channel"},
        "activations": "uniform",
        "softmax": {"type": "log2", "bits": 4},
        "overrides": [{"roles": ["first", "last"], "bits": 8}],
        "steps": ["calibrate"],
    },
    "evaluation": {"dataset": "fashion_mnist"},
}


@pytest.fixture
def base():
    return copy.deepcopy(BASE)


def changed(path, value):
    """The base recipe with one value changed, or left out where the value is ``...``."""
    data = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    table = data
    for part in parents:
        table = table[int(part) if isinstance(table, list) else part]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    return data


# strictness


def test_a_recipe_becomes_components_with_their_defaults():
    recipe = load_recipe(BASE)
    assert recipe.synthesis.sampler.max_patches == 3
    assert recipe.synthesis.target.low == 5.0
    assert type(recipe.synthesis.losses["attention_prior"].prior).__name__ == "LaplacePrior"
    assert recipe.quantization.activations.bits == load_recipe(BASE).quantization.activations.bits
    assert (recipe.seed, recipe.schema, recipe.runtime.precision) == (0, 1, "auto")
    assert [step.batch for step in recipe.quantization.steps] == [32]


MISTAKES = [
    ("sedd", 1, "sedd: unknown key; did you mean 'seed'? (keys: schema, seed, model, "),
    ("synthesis.imges", 4, "synthesis.imges: unknown key; did you mean 'images'?"),
    ("synthesis.optimizer.zzz", 4, "synthesis.optimizer.zzz: unknown key (keys: lr, betas)"),
    ("synthesis.images", "4", "synthesis.images: expected a whole number, got '4'"),
    ("synthesis.images", 4.0, "synthesis.images: expected a whole number, got 4.0"),
    ("synthesis.images", True, "synthesis.images: expected a whole number, got True"),
    ("synthesis.images", None, "synthesis.images: expected a whole number, got None"),
    ("synthesis.images", 0, "synthesis.images: 'images' must be >= 1: 0"),
    ("synthesis.optimizer.lr", "0.1", "synthesis.optimizer.lr: expected a number, got '0.1'"),
    ("synthesis.optimizer.lr", True, "synthesis.optimizer.lr: expected a number, got True"),
    ("synthesis.optimizer.lr", float("inf"), "synthesis.optimizer.lr: expected a finite number, got inf"),
    ("synthesis.optimizer.lr", 1e300, "synthesis.optimizer.lr: is too large, the maximum is 3.4e+38"),
    ("synthesis.optimizer.lr", 10**400, "synthesis.optimizer.lr: is too large, the maximum is 3.4e+38"),
    ("evaluation.batch", 2**63, "evaluation.batch: is too large, the maximum is 9.2e+18"),
    ("synthesis.optimizer.lr", float("nan"), "synthesis.optimizer.lr: expected a finite number, got nan"),
    ("synthesis.optimizer.betas", [0.5], "synthesis.optimizer.betas: expected an array of 2 values, got 1"),
    ("synthesis.optimizer.betas", 0.5, "synthesis.optimizer.betas: expected an array, got 0.5"),
    ("synthesis.optimizer.betas", [0.5, "x"], "synthesis.optimizer.betas.1: expected a number, got 'x'"),
    ("synthesis.optimizer", 3, "synthesis.optimizer: expected an optimizer (a name or a table with 'type'), got 3"),
    ("synthesis.optimizer", "adm", "synthesis.optimizer: unknown optimizer 'adm'; did you mean 'adam'? (known: "),
    ("synthesis.optimizer.type", "adm", "synthesis.optimizer.type: unknown optimizer 'adm'; did you mean 'adam'?"),
    ("synthesis.losses", [1], "synthesis.losses: expected a table of tables such as [synthesis.losses.NAME], got"),
    (
        "synthesis.losses.total_variatoin",
        {},
        "synthesis.losses.total_variatoin: unknown loss 'total_variatoin'; did you",
    ),
    (
        "synthesis.losses.attention_prior.weight",
        "x",
        "synthesis.losses.attention_prior.weight: expected a number or 'aut",
    ),
    (
        "synthesis.losses.attention_prior.weight",
        -1,
        "synthesis.losses.attention_prior.weight: must be at least 0 and ",
    ),
    ("synthesis.losses", {}, "synthesis: has no losses; add one, for example [synthesis.losses.soft_cross_entropy]"),
    ("synthesis.losses.soft_cross_entropy", ..., "synthesis: weight = 'auto' balances against a label loss"),
    ("synthesis.type", ..., "synthesis: needs 'type', the name of a source (known: "),
    ("quantization.steps", "calibrate", "quantization.steps: expected an array of tables, got 'calibrate'"),
    ("quantization.steps", ["calibrat"], "quantization.steps.0: unknown step 'calibrat'; did you mean 'calibrate'?"),
    ("quantization.steps", [], "quantization: has no steps; the first one is usually { type = 'calibrate' }"),
    (
        "quantization.overrides.0.bits",
        9,
        "quantization.overrides.0.bits: 'bits' must be in (0, 2, 3, 4, 5, 6, 7, 8, 16",
    ),
    (
        "quantization.overrides.0.roles",
        ["middle"],
        "quantization.overrides.0.roles.0: expected one of 'first', 'last', ",
    ),
    (
        "quantization.overrides.0.roles",
        [],
        "quantization.overrides.0: names no site; give 'sites' (patterns) or 'roles'",
    ),
    ("quantization.weights", ..., "quantization.weights: is required"),
    ("model", ..., "model: is required"),
    ("model", "vit", "model: expected a table, got 'vit'"),
    ("model.name", ..., "model.name: is required"),
    ("model.num_classes", 1, "model.num_classes: must be at least 2, or 0 for the model without its head, got 1"),
    ("evaluation.dataset", {"type": "image_folder"}, "evaluation.dataset.root: is required"),
    ("schema", 2, "schema: this version reads recipes of schema 1, not 2"),
    ("seed", -1, "seed: 'seed' must be >= 0: -1"),
    ("runtime", {"precision": "fp16"}, "runtime.precision: expected one of 'auto', 'float32', 'bfloat16', got 'fp16'"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=[f"{path}={value}" for path, value, _ in MISTAKES])
def test_one_mistake_is_one_line_with_its_path(path, value, message):
    (problem,) = problems_of(changed(path, value))
    assert problem.startswith(message)


def test_a_misspelt_required_key_is_one_mistake_not_two(base):
    base["model"] = {"nme": "bundled:vit_fmnist"}
    (problem,) = problems_of(base)
    assert problem.startswith("model.nme: unknown key; did you mean 'name'?")


def test_six_different_mistakes_are_six_lines(base):
    base["sead"] = 3
    base["model"]["num_classes"] = 1
    base["synthesis"]["images"] = "32"
    base["synthesis"]["losses"]["atention_prior"] = {}
    base["quantization"]["weights"]["bits"] = 40
    del base["evaluation"]["dataset"]
    found = problems_of(base)
    assert len(found) == 6
    assert {problem.partition(":")[0] for problem in found} == {
        "sead",
        "model.num_classes",
        "synthesis.images",
        "synthesis.losses.atention_prior",
        "quantization.weights.bits",
        "evaluation.dataset",
    }


def test_a_whole_number_is_a_number_and_stays_one_after_reading():
    lr = load_recipe(changed("synthesis.optimizer.lr", 1)).synthesis.optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def test_keys_of_plain_data_that_are_no_strings_are_unknown(base):
    base["model"][3] = 1
    assert problems_of(base)[0].startswith("model.3: unknown key")


def test_a_validator_that_reads_another_field_runs_when_the_whole_is_built():
    @attrs.frozen(kw_only=True)
    class Range:
        low: int = 0
        high: int = attrs.field(default=1)

        @high.validator
        def _above(self, _, value):
            if value <= self.low:
                raise ValueError(f"high must be above low, got {value}")

    problems: list[str] = []
    assert structure(Range, {"low": 1, "high": 4}, "range", problems).high == 4
    structure(Range, {"low": 4, "high": 4}, "range", problems)
    assert problems == ["range: high must be above low, got 4"]


# --set


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("quantization.weights.bits=3", lambda r: r.quantization.weights.bits == 3),
        ("synthesis.optimizer.lr = 1e-2", lambda r: r.synthesis.optimizer.lr == 0.01),
        ("synthesis.optimizer.betas=[0.1, 0.2]", lambda r: r.synthesis.optimizer.betas == (0.1, 0.2)),
        ("synthesis.optimizer.betas.1=0.7", lambda r: r.synthesis.optimizer.betas == (0.5, 0.7)),
        ("synthesis.target.low=6", lambda r: r.synthesis.target.low == 6.0),
        ("synthesis.schedule.warmup=0.5", lambda r: r.synthesis.schedule.warmup == 0.5),
        ("synthesis.losses.total_variation={ weight = 0.5 }", lambda r: len(r.synthesis.losses) == 3),
        ("quantization.overrides.0.bits=6", lambda r: r.quantization.overrides[0].bits == 6),
        ("quantization.steps.0.batch=9", lambda r: r.quantization.steps[0].batch == 9),
        ("synthesis.sampler='whole_image'", lambda r: type(r.synthesis.sampler).__name__ == "WholeImageSampler"),
        ("synthesis.sampler.type='whole_image'", lambda r: type(r.synthesis.sampler).__name__ == "WholeImageSampler"),
        ('model.name="a=b"', lambda r: r.model.name == "a=b"),
        ("runtime.threads=2", lambda r: r.runtime.threads == 2),
    ],
)
def test_set_changes_one_value_and_nothing_in_the_source(base, assignment, read):
    assert not read(load_recipe(base))
    assert read(load_recipe(base, [assignment]))
    assert base == BASE


def test_another_type_for_a_loss_discards_the_options_of_the_one_its_key_names(base):
    recipe = load_recipe(base, ["synthesis.losses.attention_prior.type='total_variation'"])
    assert recipe.synthesis.losses["attention_prior"].weight == 1.0


def test_a_student_cannot_have_a_budget():
    with pytest.raises(RecipeError, match=r"^quantization.budget: needs finished images, but synthesis.student"):
        load_recipe("psaq_vit_v2", ["quantization.budget={weights=6.0}"])


@pytest.mark.parametrize("order", [1, -1])
def test_options_set_with_a_new_type_are_kept_in_any_order(base, order):
    both = [
        "quantization.softmax.bits=2",
        'quantization.softmax.type="uniform"',
        "quantization.weights={type='uniform'}",
    ]
    quantization = load_recipe(base, [*both, "quantization.weights.bits=8"][::order]).quantization
    assert (type(quantization.softmax).__name__, quantization.softmax.bits) == ("UniformQuantizer", 2)
    assert quantization.weights.bits == 8


def test_set_applies_from_left_to_right_and_the_seed_last(base):
    recipe = load_recipe(base, ["seed=1", "seed=2", "synthesis.images=5"], seed=7)
    assert (recipe.seed, recipe.synthesis.images) == (7, 5)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set seed: expected key=value, for example quantization.weights.bits=3"),
        ("=3", "--set =3: expected key=value"),
        ("synthesis.sampler=whole", "--set synthesis.sampler=whole: the value is not TOML; strings need quotes: "),
        ("seed=1\nmodel = 2", "--set seed=1\nmodel = 2: the value is not TOML"),
        ("seed.deep=1", "--set seed.deep: 'seed' is a value and has no keys"),
        (
            "quantization.steps.3.batch=1",
            "--set quantization.steps.3.batch: '3' is not a position of this list (0 to 0)",
        ),
        ("quantization.steps.x.batch=1", "--set quantization.steps.x.batch: 'x' is not a position of this list"),
        ("quantization.weights.bitz=3", "quantization.weights.bitz: unknown key; did you mean 'bits'?"),
        ("quantisation.weights.bits=3", "quantisation: unknown key; did you mean 'quantization'?"),
        ("quantization.weights.bits='3'", "quantization.weights.bits: expected a whole number, got '3'"),
        ("synthesis.losses.tv.weight=1", "synthesis.losses.tv: unknown loss 'tv'"),
    ],
)
def test_set_of_what_is_not_there_is_refused(base, assignment, message):
    base["seed"] = 1
    with pytest.raises(RecipeError) as caught:
        load_recipe(base, [assignment])
    (problem,) = caught.value.problems
    assert problem.startswith(message)


def test_every_mistake_in_set_is_told_at_once(base):
    assert len(problems_of(base, "seed", "model.name=x", "synthesis.images.x=1")) == 3


# the resolved copy


def test_the_resolved_copy_writes_every_default_out():
    data = load_recipe(BASE).to_dict()
    assert data["schema"] == 1
    assert data["synthesis"]["target"] == {"type": "soft_label", **load_recipe(BASE).to_dict()["synthesis"]["target"]}
    assert data["synthesis"]["losses"]["attention_prior"]["type"] == "attention_prior"
    assert data["synthesis"]["schedule"]["type"] == "warmup_cosine"
    assert data["quantization"]["steps"][0]["observer"]["type"] == "percentile_mse"
    assert "checkpoint" not in data["model"]


def complete():
    return [name for name in shipped() if is_complete(name)]


@pytest.mark.parametrize("source", [BASE, *complete()], ids=["base", *complete()])
def test_the_resolved_copy_reads_back_as_the_same_recipe(source, tmp_path):
    recipe = load_recipe(source, ["seed=3"])
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe.to_dict()), encoding="utf-8")
    again = load_recipe(path)
    assert again.to_dict() == recipe.to_dict()
    assert digest(again.to_dict()) == digest(recipe.to_dict())
    assert load_recipe(recipe).to_dict() == recipe.to_dict()


def test_every_shipped_part_takes_a_place_in_a_recipe():
    assert {"quickstart", "images/spdfq", "backends/blockwise", "models/vit_fmnist"} <= set(shipped())
    for name in shipped():
        assert resolve(name).keys() <= {field.name for field in attrs.fields(Recipe)}
        load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise", name]})


def test_soft_labels_missing_beside_several_semantics_is_a_warning_and_so_are_random_weights():
    assert load_recipe(BASE).warnings() == []
    (label,) = load_recipe(changed("synthesis.target", "one_hot")).warnings()
    assert label.startswith("synthesis: multi_semantic without soft labels")
    (weights,) = load_recipe(changed("model", {"name": "vit_tiny_patch16_224", "pretrained": False})).warnings()
    assert weights.startswith("model: random weights")


def test_the_digest_is_stable_and_reads_values_not_order():
    expected = hashlib.sha256(b'[{"a":1,"b":[1.5,"x"]}]').hexdigest()[:20]
    assert expected == "7f79f3394218b6904ff6"
    assert digest({"a": 1, "b": [1.5, "x"]}) == digest({"b": [1.5, "x"], "a": 1}) == expected
    assert digest("a", "b") != digest("ab")
    assert digest({"a": 1}) != digest({"a": 1.0})


def test_a_folder_and_an_empty_recipe_are_one_clear_line(tmp_path):
    (tmp_path / "run.toml").mkdir()
    for folder in (tmp_path, tmp_path / "run.toml"):
        assert problems_of(str(folder)) == [
            f"{folder}: is a folder; give the recipe.toml inside it, or another .toml file"
        ]
    (tmp_path / "empty.toml").write_text("# nothing")
    for source, name in ((str(tmp_path / "empty.toml"), str(tmp_path / "empty.toml")), ({}, "recipe")):
        assert problems_of(source) == [f"{name}: is empty; 'spdfq init quickstart' prints a recipe to start from"]
