"""Who imports whom (downwards only, no circles, read from the source), lean imports, and the public surface."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import spdfq

ROOT = Path(spdfq.__file__).parent
CLI = ROOT.parent / "cli"

# bottom first; a room imports from its own layer and those below
LAYERS = [
    {"errors", "toml", "files", "ranks", "registry", "structure", "recipefile", "recipe", "runtime", "attention"},
    {"zoo", "architectures", "models", "data", "predictions", "losses", "quantizers"},
    {"synth", "backends", "evaluate", "features", "measures", "export"},
    {"checkpoint", "store", "provenance", "published", "report"},
    {"pipeline", "inspection", "api"},
    {"benchfile", "benchtable", "bench", "describe", "commented"},
    {"__init__"},
    {"spdfq_cli"},
    {"__main__"},
]
STAGES = {"synth", "backends", "evaluate"}

PUBLIC = {
    "spdfq": {"Recipe", "RunResult", "SpdfqError", "Teacher", "load_quantized", "load_recipe", "load_teacher"}
    | {"quantize", "run", "synthesize"},
    "spdfq.losses": {"AttentionPriorLoss", "CrossEntropyLoss", "GaussianMixturePrior", "LaplacePrior", "Loss"}
    | {"LossInputs", "PatchSimilarityEntropyLoss", "SoftCrossEntropyLoss", "TotalVariationLoss"}
    | {"AttentionEntropyLoss", "FrequencyConsistencyLoss", "HeadSimilarityLoss", "MaskedAttentionAlignmentLoss"}
    | {"PatchContrastLoss", "TeacherStudentDiscrepancyLoss"},
    "spdfq.losses.functional": {"attention_prior_loss", "cross_entropy", "patch_similarity_entropy"}
    | {"soft_cross_entropy", "total_variation", "attention_entropy", "frequency_consistency", "frequency_split"}
    | {"head_similarity", "head_ssim", "masked_attention_distance", "patch_contrast", "teacher_student_discrepancy"},
    "spdfq.synth": {"Adam", "AdamW", "Augmentation", "Change", "ChannelOffset", "ColorJitter", "Constant", "CropPlan"}
    | {"Flip", "GaussianNoise", "HighPass", "Jitter", "LowPass", "Moment", "Move", "MultiSemanticSampler", "NoTarget"}
    | {"OneHotTarget", "OptimizedImages", "Optimizer", "RandomResizedCrop", "RealImages", "Schedule", "SoftLabelTarget"}
    | {"Source", "SpectralAdam", "StudentTraining", "SyntheticImages", "TokenPruning", "WarmupCosine"}
    | {"WholeImageSampler"},
    "spdfq.quantizers": {"AdaptiveLogQuantizer", "DualUniformQuantizer", "GridMseObserver", "Log2Quantizer"}
    | {"LogSqrt2Quantizer", "MinMaxObserver", "Observer", "PercentileMseObserver", "PowerOfTwoFactorQuantizer"}
    | {"Product", "ProgressiveObserver", "Quantizer", "RunningMinMaxObserver", "ShiftUniformLog2Quantizer"}
    | {"TwinUniformQuantizer", "UniformQuantizer", "learned_scales"},
    "spdfq.backends": {
        "AdaLog",
        "AdaRound",
        "Blockwise",
        "Calibrate",
        "Calibration",
        "Distill",
        "MatmulInputs",
        "PowerOfTwoFactors",
        "Psaq",
        "QuantizedModel",
        "RepQ",
        "Ridge",
        "Site",
        "Step",
        "WeightsOnly",
        "place",
    }
    | {"quantize"},
    "spdfq.recipe": {"Budget", "Evaluation", "ModelSpec", "Override", "Published", "PublishedRow", "Quantization"}
    | {"Recipe", "RuntimeSpec", "assign", "digest"}
    | {"load_recipe", "locate", "merge", "merge_parents", "read", "resolve", "shipped", "to_toml"},
}
ALSO_PUBLIC = {
    "spdfq.attention": {"record_attention", "AttentionRecord", "CLASS_ATTENTION", "ATTENTION_OUTPUTS"}
    | {"QUERIES_AND_KEYS"},
    "spdfq.data": {"Batch", "DecodedImages", "FashionMnist", "ImageFolder", "ImageList", "LabelledImages", "Parquet"}
    | {"WebDataset"},
    "spdfq.errors": {"SpdfqError", "RecipeError", "ModelError", "DataError", "NonFiniteError"},
    "spdfq.evaluate": {"accuracy", "agreement", "logits_over"},
    "spdfq.features": {"nearest_neighbours", "similarity"},
    "spdfq.models": {"Teacher", "load_teacher"},
    "spdfq.registry": {"Registry", "Registration", "registry", "REGISTRIES", "losses", "priors", "sources", "samplers"}
    | {
        "targets",
        "augmentations",
        "optimizers",
        "schedules",
        "quantizers",
        "observers",
        "placements",
        "steps",
        "datasets",
    },
    "spdfq.runtime": {"Runtime", "generator", "make_runtime", "rich_progress", "silent"},
    "spdfq.structure": {"component", "components", "component_list"},
}


def modules():
    """Module name -> file, of the library and the command line."""
    found = {".".join(("spdfq", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    found |= {".".join(("spdfq_cli", *path.relative_to(CLI).with_suffix("").parts)): path for path in CLI.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


MODULES = modules()


def imports(name):
    """Modules of ours that a module imports, inside functions too; what only type checkers read does not count."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in named}
    return {module for module in found if module.partition(".")[0] in ("spdfq", "spdfq_cli")} - {name}


def room(module):
    top, _, rest = module.partition(".")
    return top if top == "spdfq_cli" else rest.partition(".")[0] or "__init__"


IMPORTS = {name: imports(name) for name in MODULES}


def test_the_map_below_is_read_from_real_files():
    assert len(MODULES) > 50
    assert "spdfq.registry" in IMPORTS["spdfq.losses.priors"]
    assert sum(map(len, IMPORTS.values())) > 150


def test_every_room_has_a_layer():
    rooms = {room(name) for name in MODULES} - {"recipes"}
    assert rooms - set().union(*LAYERS) == set(), "add new rooms to LAYERS, and to docs/architecture.md"


def test_imports_go_downwards_only():
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if height[room(other)] > height.get(room(name), 0)
    ]
    assert upward == []


def test_a_stage_knows_nothing_of_the_other_stages():
    across = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(name) in STAGES and room(other) in STAGES - {room(name)}
    ]
    assert across == []


def test_no_module_imports_itself_by_way_of_others():
    # a package's modules may import their siblings past its __init__, which imports them all
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("statement", ["import spdfq", "import spdfq.recipe", "import spdfq_cli.main", "dir(spdfq)"])
def test_lean_imports_bring_neither_torch_nor_timm(statement):
    code = f"import sys, spdfq; {statement}; print(sorted({{'torch', 'timm', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_parts_leaves_timm_for_later():
    code = "import sys, spdfq.pipeline, spdfq.data, spdfq.synth, spdfq.backends; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_surface_is_the_list_in_this_file(name):
    module = import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert set(module.__all__) == PUBLIC[name], "a public name came or went: edit the list, the docs and the changelog"


@pytest.mark.parametrize("name", PUBLIC | ALSO_PUBLIC)
def test_every_public_name_is_there(name):
    module = import_module(name)
    assert {public for public in (PUBLIC | ALSO_PUBLIC)[name] if not hasattr(module, public)} == set()


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spdfq' has no attribute 'quantise'"):
        spdfq.quantise  # noqa: B018


def test_no_file_is_longer_than_400_lines():
    assert [str(path) for path in MODULES.values() if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
