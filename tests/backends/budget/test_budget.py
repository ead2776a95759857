"""Mixed precision: the exact choice, what is counted and measured, and the resulting model."""

import sys
from contextlib import contextmanager
from itertools import product

import attrs
import pytest
import torch
import torch.nn.functional as F
from support.backends import RUNTIME, back_end, images, quantized, teacher, teacher_of
from torch import nn

from spdfq.backends import quantize
from spdfq.backends.budget import allocation, sensitivity
from spdfq.backends.budget.allocation import Item, allocated, bits_within, budget_items, least_cost
from spdfq.backends.budget.knapsack import Choice, least_loss
from spdfq.backends.quantize import check_quantization
from spdfq.errors import DataError, NonFiniteError, RecipeError
from spdfq.quantized import place
from spdfq.recipe import Budget, load_recipe

WEIGHTS = "quantization.budget={weights=4.0, choices=[2, 3, 4, 6], images=2}"
OPERATIONS = "quantization.budget={operations=16.0, choices=[3, 4, 5], images=2}"
ONLY = "quantization.overrides=[{sites=['blocks.*', 'patch_embed.*'], bits=4}]"


def within(chosen, *overrides, folder=None, **changes):
    spec = back_end(*overrides)
    return bits_within(spec.budget, chosen, images(4), spec, attrs.evolve(RUNTIME, **changes), folder)


def mean_bits(bits, sizes):
    return sum(bits[site] * size for site, size in sizes.items()) / sum(sizes.values())


# the exact choice


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_combinations(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, [], generator=generator))  # noqa: E731
    everything = [[Choice(draw(30), draw(1000) / 7) for _ in range(3)] for _ in range(5)]
    for budget in (40, 60, 80, 200):
        found = least_loss(everything, budget)
        fitting = [
            combination
            for combination in product(range(3), repeat=5)
            if sum(item[index].cost for item, index in zip(everything, combination, strict=True)) <= budget
        ]
        if not fitting:
            assert found is None
            continue
        losses = {c: sum(item[i].loss for item, i in zip(everything, c, strict=True)) for c in fitting}
        assert losses[tuple(found)] == pytest.approx(min(losses.values()))


def test_among_equals_the_cheaper_one_is_taken():
    assert least_loss([[Choice(5, 1.0), Choice(3, 1.0), Choice(2, 2.0)]], 10) == [1]


def test_many_items_with_sizes_that_share_a_unit_are_solved():
    sizes = [3, 1, 4, 4] * 40
    everything = [[Choice(size * 147456 * bits, size * 4.0**-bits) for bits in range(2, 9)] for size in sizes]
    found = least_loss(everything, 4 * 147456 * sum(sizes))
    # with losses proportional to size, four bits everywhere cannot be beaten
    assert sum(item[index].loss for item, index in zip(everything, found, strict=True)) == pytest.approx(
        sum(sizes) * 4.0**-4
    )


def test_what_matters_more_gets_more_bits():
    found = allocated(
        [Item(("small",), 1), Item(("large",), 3)],
        Budget(weights=4.0, choices=(2, 4, 8)),
        {},
        {(site, bits): factor * 4.0**-bits for site, factor in (("small", 99), ("large", 1)) for bits in (2, 4, 8)},
    )
    # 16 bits for 4 numbers: 8 for the small one leaves 2 for each of the large one's three
    assert found == {"small": 8, "large": 2}


# what is counted


def test_a_budget_of_weights_counts_every_quantized_weight():
    model = place(teacher("vit"), back_end("quantization.overrides=[{sites=['head.weight'], bits=0}]"))
    found = budget_items(model, Budget(weights=4.0), images(1))
    sizes = {item.sites[0]: item.size for item in found}
    block = {"attn.qkv": 96 * 32, "attn.proj": 32 * 32, "mlp.fc1": 128 * 32, "mlp.fc2": 32 * 128}
    expected = {f"blocks.{b}.{layer}.weight": size for b in (0, 1) for layer, size in block.items()}
    assert sizes == {"patch_embed.proj.weight": 32 * 3 * 64, **expected}


def test_a_budget_of_operations_counts_every_multiplication_of_an_image():
    model = place(teacher("vit", depth=1), back_end())
    found = {item.sites: item.size for item in budget_items(model, Budget(operations=16.0), images(1))}
    attention = 2 * 17 * 17 * 16  # heads, queries, keys, width
    assert found == {
        ("patch_embed.proj.input", "patch_embed.proj.weight"): 16 * 32 * 3 * 64,
        ("blocks.0.attn.qkv.input", "blocks.0.attn.qkv.weight"): 17 * 96 * 32,
        ("blocks.0.attn.query", "blocks.0.attn.key"): attention,
        ("blocks.0.attn.softmax", "blocks.0.attn.value"): attention,
        ("blocks.0.attn.proj.input", "blocks.0.attn.proj.weight"): 17 * 32 * 32,
        ("blocks.0.mlp.fc1.input", "blocks.0.mlp.fc1.weight"): 17 * 128 * 32,
        ("blocks.0.mlp.fc2.input", "blocks.0.mlp.fc2.weight"): 17 * 128 * 32,
        ("head.input", "head.weight"): 10 * 32,
    }


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.qkv, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 15), nn.Linear(5, 10)

    def forward(self, pixels):
        query, key, value = self.qkv(self.patch(pixels).flatten(2).mT).chunk(3, -1)
        scores = torch.einsum("bqd,bkd->bqk", query, key).softmax(-1)
        return self.head(torch.einsum("bqk,bkd->bqd", scores, value).mean(1))


def test_products_by_einsum_are_counted_by_their_equation():
    model = place(teacher_of(Einsum()), back_end())
    sizes = {item.sites: item.size for item in budget_items(model, Budget(operations=16.0), images(1))}
    assert sizes["product0_left", "product0_right"] == sizes["product1_left", "product1_right"] == 16 * 16 * 5


@pytest.mark.parametrize("name", ["swin", "swinv2", "cait", "beit"])
def test_every_product_of_two_quantized_sites_is_counted(name):
    model = place(teacher(name), back_end())
    found = [site for item in budget_items(model, Budget(operations=16.0), images(1)) for site in item.sites]
    assert sorted(found) == sorted(model.quantizers)


# the resulting bits


def test_the_mean_stays_within_the_budget_and_the_bits_among_the_choices():
    chosen = teacher("vit")
    model = quantized(chosen, WEIGHTS)
    bits = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
    sizes = {name: model.weight(name).numel() for name in model.weight_names()}
    assert {bits[name] for name in sizes} <= {2, 3, 4, 6}
    assert len({bits[name] for name in sizes}) > 1
    assert 3.5 < mean_bits(bits, sizes) <= 4.0
    assert {bits[name] for name in bits if name not in sizes} == {4}
    rows = {row["name"]: row["bits"] for row in model.site_table()["quantized"]}
    assert rows == bits


def test_operations_vary_activations_too():
    chosen = teacher("vit")
    spec = back_end(OPERATIONS)
    bits = within(chosen, OPERATIONS)
    model = place(chosen, spec)
    assert bits.keys() == model.quantizers.keys()
    counted = budget_items(model, spec.budget, images(1))
    spent = sum(item.size * bits[item.sites[0]] * bits[item.sites[1]] for item in counted)
    assert 15 < spent / sum(item.size for item in counted) <= 16.0


def test_overridden_sites_keep_their_bits_and_count():
    bits = within(teacher("vit"), ONLY, "quantization.budget={weights=4.02, choices=[2, 3, 5, 6], images=2}")
    # 30,720 weights have 4 bits; with the head's 320 there are (4.02 * 31,040 - 4 * 30,720) / 320 = 5.94 bits for it
    assert bits == {"head.weight": 5}


def test_the_sensitivity_of_a_site_is_the_divergence_when_it_alone_is_quantized(monkeypatch):
    chosen, seen = teacher("vit"), {}
    monkeypatch.setattr(allocation, "allocated", lambda found, budget, fixed, measured: seen.update(measured) or {})
    within(chosen, WEIGHTS)
    site = "blocks.0.mlp.fc1.weight"
    plain = place(chosen, back_end("quantization.overrides=[{sites=['*'], bits=0}]"))
    model = quantized(chosen, "quantization.weights.bits=3", count=4)
    with torch.no_grad():
        plain.weight(site).copy_(model.quantizers[site](plain.weight(site)))
        logits, wanted = plain(images(4)[:2]), chosen.module(images(4)[:2])
    expected = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert seen[site, 3] == pytest.approx(expected.item(), rel=1e-3)
    assert len(seen) == 10 * 4
    sums = [sum(value for (_, bits), value in seen.items() if bits == width) for width in (2, 3, 6)]
    assert sums[0] > sums[1] > sums[2]


def test_no_other_bits_of_the_same_budget_have_a_smaller_sensitivity(monkeypatch):
    chosen, seen, choose = teacher("vit"), {}, allocation.allocated
    monkeypatch.setattr(
        allocation,
        "allocated",
        lambda found, budget, fixed, measured: seen.update(measured) or choose(found, budget, fixed, measured),
    )
    bits = within(chosen, WEIGHTS)
    assert sum(seen[pair] for pair in bits.items()) <= sum(seen[site, 4] for site in bits)


def test_it_is_deterministic_and_goes_on_where_it_was(tmp_path, monkeypatch):
    chosen, seen, measure = teacher("vit"), [], sensitivity._divergences

    def watch(model, sites, calibration, count):
        for site, value in measure(model, sites, calibration, count):
            seen.append(site)
            yield site, value

    monkeypatch.setattr(sensitivity, "_divergences", watch)
    first = within(chosen, WEIGHTS)
    assert len(seen) == 40

    @contextmanager
    def interrupted(_, __):
        done = []

        def advance(steps=1, **values):
            done.extend(range(steps))
            if len(done) > 25:
                raise KeyboardInterrupt

        yield advance

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        within(chosen, WEIGHTS, folder=tmp_path, progress=interrupted)
    assert len(seen) == 26
    assert within(chosen, WEIGHTS, folder=tmp_path) == first
    assert len(seen) == 40


@pytest.mark.parametrize("budget", [WEIGHTS, OPERATIONS])
@pytest.mark.parametrize("parts", ["activations, weights", "weights, activations", "all, weights, activations"])
def test_each_kind_is_measured_with_the_observer_that_chooses_its_ranges(monkeypatch, budget, parts):
    def measured(steps):
        seen = []
        monkeypatch.setattr(allocation, "allocated", lambda *args: seen.append(args[-1]) or {})
        within(teacher("vit"), budget, f"quantization.steps=[{steps}]")
        return seen[0]

    every = {
        "all": "{type='calibrate'}",
        "weights": "{type='calibrate', sites='weights', weight_observer='minmax'}",
        "activations": "{type='calibrate', sites='activations', observer='minmax'}",
    }
    together = measured("{type='calibrate', observer='minmax', weight_observer='minmax'}")
    assert measured(", ".join(every[part] for part in parts.split(", "))) == together
    assert measured(every["all"]) != together


def test_measurements_of_other_work_are_refused(tmp_path):
    within(teacher("vit"), WEIGHTS, folder=tmp_path)
    for other in ({"seed": 9}, {"precision": "bfloat16"}):
        with pytest.raises(DataError, match=r"sensitivity.safetensors: is the state of another model, of other"):
            within(teacher("vit"), WEIGHTS, folder=tmp_path, **other)
    for other in ("quantization.steps=['calibrate']", "quantization.budget.images=1", "quantization.gelu='log2'"):
        with pytest.raises(DataError, match="give another folder, or delete it"):
            within(teacher("vit"), WEIGHTS, other, folder=tmp_path)


def test_another_limit_takes_the_measurements_that_are_there(tmp_path, monkeypatch):
    within(teacher("vit"), WEIGHTS, folder=tmp_path)
    monkeypatch.setattr(sensitivity, "_divergences", None)
    within(teacher("vit"), WEIGHTS.replace("4.0", "3.0"), folder=tmp_path)


def test_outputs_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["spdfq.backends.quantize"], "check_images", lambda *_: None)
    given, spec = images(4), back_end(WEIGHTS)
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"patch_embed.proj.weight: the output is not finite"):
        quantize(teacher("vit"), given, spec, RUNTIME)


# what a recipe may say


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("{weights=1.5}", "quantization.budget.weights: 1.5 cannot be reached; the least is 2.000"),
        ("{operations=3.9}", "quantization.budget.operations: 3.9 cannot be reached; the least is 4.000"),
    ],
)
def test_a_budget_that_cannot_be_reached_is_refused_before_anything_runs(budget, line):
    with pytest.raises(RecipeError) as raised:
        check_quantization(teacher("vit"), back_end(f"quantization.budget={budget}"))
    assert raised.value.problems == [line]


def test_a_budget_without_a_choice_is_refused():
    with pytest.raises(RecipeError, match=r"every site that weights counts is in float or has bits of its own"):
        check_quantization(teacher("vit"), back_end("quantization.overrides=[{sites=['*'], bits=4}]", WEIGHTS))


def test_operations_need_the_operands_at_their_products():
    with pytest.raises(RecipeError, match=r"what blocks.0.attn.qkv.weight multiplies is quantized elsewhere"):
        check_quantization(teacher("vit"), back_end("quantization.placement='psaq'", OPERATIONS))
    check_quantization(teacher("vit"), back_end("quantization.placement='psaq'", WEIGHTS))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{}", "give one of 'weights'"),
        ("{weights=4.0, operations=16.0}", "give one of 'weights'"),
        ("{weights=4.0, choices=[2, 2]}", "different whole numbers from 2 to 8"),
        ("{weights=4.0, choices=[1, 4]}", "different whole numbers from 2 to 8"),
        ("{weights=0.0}", "must be > 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget, message):
    with pytest.raises(RecipeError, match=message):
        back_end(f"quantization.budget={budget}")


@pytest.mark.parametrize(("weights", "bits"), [(4.1, 5), (4.0999, 4), (1e38, 5)])
def test_a_budget_is_the_number_that_was_written(weights, bits):
    """4.1 times 100 is 409.99999999999994 in binary fractions."""
    measured = {("a", 4): 0.0, ("a", 5): 0.0, ("b", 4): 1.0, ("b", 5): 0.0}
    budget = Budget(weights=weights, choices=(4, 5))
    assert allocated([Item(("a",), 90), Item(("b",), 10)], budget, {}, measured)["b"] == bits


def test_the_least_that_can_be_reached_is_reached():
    for size, fixed in ((189, 6), (666048, 5), (1342080, 3)):
        counted, given = [Item(("a",), size), Item(("b",), 7)], {"b": fixed}
        low = least_cost(counted, Budget(weights=8.0), given) / (size + 7)
        assert allocated(counted, Budget(weights=low), given, {}) == {"a": 2}


def test_the_command_line_sets_it():
    recipe = load_recipe("quickstart", ["quantization.budget.weights=4.0"])
    assert recipe.quantization.budget == Budget(weights=4.0)
    assert load_recipe(recipe).quantization.budget == Budget(weights=4.0)
