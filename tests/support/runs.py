"""A small recipe from end to end, and what the tests ask of its runs."""

from PIL import Image
from safetensors.torch import load_file

from spdfq.runs.pipeline import run
from spdfq.synth import SyntheticImages
from spdfq.teacher.zoo import data_file

IMAGES, ITERATIONS = 2, 3
STAGES = ["teacher", "images", "quantize", "evaluate"]
STEPS = [
    {"type": "calibrate", "observer": "minmax", "weight_observer": "minmax"},
    {"type": "blockwise", "iterations": 1, "lr": 1e-3},
]


def save_photos(root):
    """A test image of each class, in folders."""
    stored = load_file(data_file("fmnist_test.safetensors"))
    for label in range(10):
        (root / str(label)).mkdir()
        pixels = stored["images"][stored["labels"] == label][0]
        Image.fromarray(pixels.squeeze().numpy()).save(root / str(label) / "0.png")
    return root


def recipe_on(photos):
    return {
        "extends": ["models/vit_fmnist", "images/spdfq", "backends/blockwise"],
        "synthesis": {"images": IMAGES, "group": 1, "iterations": ITERATIONS},
        "quantization": {"steps": STEPS},
        "evaluation": {"dataset": {"type": "image_folder", "root": str(photos)}, "batch": 5},
    }


def again(finished, recipe, name, **options):
    """Another run beside the first."""
    return run(recipe, out=finished.folder.parent / name, **options)


def reused(result):
    return [name for name, stage in result.stages.items() if stage["reused"]]


def images_of(result):
    return SyntheticImages.load(result.folder / "synthetic.safetensors")
