"""The examples of the documentation, run from the text of the pages."""

import json
import re
import runpy
import tomllib

import pytest
import torch
from support.docs import DOCS, ROOT, blocks, built_in, text
from support.teachers import tiny_teacher
from torchvision.models import VisionTransformer

import spdfq
from spdfq import registry
from spdfq.data import FashionMnist
from spdfq.quantized import save_quantized
from spdfq.quantizers.packing import pack
from spdfq.recipe.structure import unstructure


@pytest.fixture
def run_as_script(tmp_path, monkeypatch):
    """Runs code like a script in a folder of its own, with 2 iterations, few images and 32 evaluation images."""
    load = FashionMnist._load
    monkeypatch.setattr(FashionMnist, "_load", lambda self: tuple(tensor[:32] for tensor in load(self)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPDFQ_STORE", raising=False)
    for kind in registry.REGISTRIES.values():  # what a script registers is forgotten after the test
        kind._load()
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))

    def run(code):
        code, shortened = re.subn(r"(?<=iterations=)\d+", "2", code)
        assert shortened or "iterations" not in code
        code = re.sub(r"(?<=[( ]images=)32", "4", code)
        (tmp_path / "script.py").write_text(code, encoding="utf-8")
        return runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")

    return run


def test_the_readmes_example_has_at_most_twelve_lines_and_runs(run_as_script):
    (example,) = blocks(ROOT / "README.md", "python")
    assert sum(1 for line in example.splitlines() if line) <= 12
    assert max(map(len, example.splitlines())) <= 120
    seen = run_as_script(example)
    assert seen["images"].shape == (4, 1, 28, 28)
    assert seen["quantized"](seen["images"]).shape == (4, 10)


def test_the_readmes_recipe_has_at_most_eight_lines_and_both_load():
    recipe, integers = blocks(ROOT / "README.md", "toml")
    assert sum(1 for line in recipe.splitlines() if line) <= 8
    assert list(spdfq.load_recipe(tomllib.loads(recipe)).controls) == ["gaussian_noise"]
    assert spdfq.load_recipe(tomllib.loads(integers)).quantization.activations.bits == 8


def test_a_loss_that_a_script_registers_is_forgotten_after_the_test():
    assert "contrast" not in registry.losses.names()


def test_the_example_of_a_module_of_ones_own_runs_and_reloads(run_as_script):
    (code,) = (found for found in blocks(DOCS / "own-model.md", "python") if "Teacher" in found)
    seen = run_as_script(code)
    assert (seen["reloaded"](seen["images"]) == seen["quantized"](seen["images"])).all()
    bits = {row["name"]: row["bits"] for row in seen["quantized"].site_table()["quantized"]}
    assert bits["head.weight"] == 8
    assert bits["blocks.0.attn.qkv.weight"] == 4


@pytest.mark.parametrize(
    ("library", "sites"), [("SwinTransformer", 54), ("VisionTransformer", 28), ("transformers", 36)]
)
def test_a_model_from_elsewhere_is_quantized_as_its_page_shows(run_as_script, library, sites):
    examples = blocks(DOCS / "models-from-elsewhere.md", "python")
    (code,) = (found for found in examples if re.search(rf"^from \S*{library}|import {library}$", found, re.MULTILINE))
    if library == "transformers":
        pytest.importorskip("transformers", reason="not a dependency; the page says which version was tried")
    seen = run_as_script(code)
    table = seen["quantized"].site_table()
    bits = [row["bits"] for row in table["quantized"]]
    assert len(bits) == sites
    assert bits.count(8) == 4, "weight and input of the first and of the last layer"
    assert set(bits) == {4, 8}
    assert not [row for row in table["float"] if row["what"].endswith("not quantized")]
    if "before" in seen:
        torch.testing.assert_close(seen["after"], seen["before"])


def test_attention_that_cannot_be_seen_stays_in_float_and_is_listed():
    (code,) = blocks(DOCS / "models-from-elsewhere.md", "toml")

    class Hidden(VisionTransformer):
        def forward(self, images):
            with torch._C.DisableTorchFunction():
                tokens = self._process_input(images)
                tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
                encoded = self.encoder(tokens)
            return self.heads(encoded[:, 0])

    module = Hidden(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10).eval()
    teacher = spdfq.Teacher(module, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 32, 32))
    recipe = spdfq.load_recipe(
        tomllib.loads(code), overrides=["quantization.overrides=[]", "synthesis.images=2", "synthesis.iterations=2"]
    )
    table = spdfq.quantize(teacher, spdfq.synthesize(teacher, recipe), recipe).site_table()
    texts = blocks(DOCS / "models-from-elsewhere.md", "text")
    (what,) = (text.partition(": ")[2].strip() for text in texts if text.startswith("blocks.0.attn."))
    listed = [row["name"] for row in table["float"] if row["what"] == what]
    assert {"conv_proj.convolution"} < set(listed)
    assert any(name.startswith("encoder.layers.encoder_layer_0.self_attention.") for name in listed)
    assert table["multiplications"]["percent_in_float"] > 99


@pytest.fixture(scope="module")
def decoder():
    """The names that the decoder on the page of the checkpoint format defines."""
    names = {}
    exec(blocks(DOCS / "checkpoint-format.md", "python")[0], names)
    return names


@pytest.mark.parametrize(
    "weights",
    [
        {"type": "uniform", "bits": 3, "symmetric": True, "granularity": "channel"},
        {"type": "uniform", "bits": 5},
        {"type": "dual_uniform", "bits": 4, "granularity": "channel", "share": 0.1},
        {"type": "power_of_two_factor", "bits": 6, "axis": 0},
        {"type": "twin_uniform", "bits": 4, "split": "sign"},
    ],
    ids=lambda weights: f"{weights['type']}-{weights['bits']}",
)
def test_the_pages_decoder_reads_the_weights_that_load_quantized_gives(decoder, weights, tmp_path):
    calibrate = {"type": "calibrate", "observer": "minmax", "weight_observer": "minmax"}
    quantization = {"placement": "weights_only", "weights": weights, "steps": [calibrate]}
    quantization |= {"activations": "uniform", "softmax": "log2"}  # required, but unused by this placement
    data = {
        "extends": ["models/vit_fmnist", "images/gaussian_noise"],
        "quantization": quantization | {"softmax": "log2"},
    }
    recipe = spdfq.load_recipe(data, overrides=["synthesis.images=1"])
    teacher = tiny_teacher()
    quantized = spdfq.quantize(teacher, spdfq.synthesize(teacher, recipe), recipe)
    save_quantized(quantized, tmp_path, teacher)
    loaded = spdfq.load_quantized(tmp_path, teacher.module)
    read = decoder["weights"](tmp_path)
    assert sorted(read) == sorted(loaded.weight_names())
    for name, values in read.items():
        assert torch.equal(torch.from_numpy(values), loaded.weight(name).detach())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((name, {}) for name in built_in(registry.quantizers)),
        ("uniform", {"granularity": "channel"}),
        ("twin_uniform", {"split": "sign"}),
        ("adaptive_log", {"shift": 0.17}),
        ("adaptive_log", {"shift": 0.17, "folded": True}),
    ],
)
def test_the_pages_formula_gives_the_value_of_every_code(decoder, kind, options, bits):
    quantizer = registry.quantizers.get(kind)(bits=bits, **options)
    data = torch.rand(8, 400, generator=torch.Generator().manual_seed(0)) ** 3
    quantizer.observe(data)
    quantizer.freeze()
    codes = (torch.arange(8 * 400) % 2**bits).reshape(8, 400).to(torch.uint8)
    stored = {name: tensor.numpy() for name, tensor in quantizer.tensors().items()}
    values = decoder["decode"](codes.numpy(), unstructure(quantizer, "quantizer"), stored)
    torch.testing.assert_close(torch.from_numpy(values), quantizer.decode(codes), rtol=1e-6, atol=0)


def test_the_pages_example_of_packing_holds(decoder):
    assert pack(torch.tensor([5, 1, 6], dtype=torch.uint8), 3).tolist() == [141, 1]
    assert decoder["unpack"](torch.tensor([141, 1], dtype=torch.uint8).numpy(), 3, [3]).tolist() == [5, 1, 6]


def test_the_page_of_the_format_has_every_key_and_every_quantizer(tmp_path):
    page = text(DOCS / "checkpoint-format.md")
    teacher = tiny_teacher()
    recipe = spdfq.load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/repq"]})
    quantized = spdfq.quantize(
        teacher, torch.randn(2, *teacher.input_size), recipe, overrides=["quantization.overrides=[]"]
    )
    save_quantized(quantized, tmp_path, teacher)
    config = json.loads(text(tmp_path / "config.json"))
    assert [key for key in (*config, *config["teacher"]) if f"`{key}`" not in page] == []
    assert [name for name in built_in(registry.quantizers) if f"| `{name}` |" not in page] == []
    assert f"`format` is {config['format']}." in page


@pytest.mark.parametrize("name", ["contrast", "square_root", "two_halves", "bias_correction", "coloured_noise"])
def test_a_component_written_on_its_page_works_in_a_recipe(run_as_script, name):
    (code,) = (found for found in blocks(DOCS / "writing-components.md", "python") if f'register("{name}"' in found)
    seen = run_as_script(code)
    assert 0 <= seen["run"].metrics["quantized"]["top1"] <= 100
    used = text(seen["run"].folder / "recipe.toml")
    assert f'type = "{name}"' in used or f'"{name}"' in used
    assert spdfq.load_quantized(seen["run"].folder / "quantized").sites
