"""The public names: removing one fails here, and so does adding one that is not a registered component."""

import inspect
from importlib import import_module

import pytest

import spdfq
from spdfq.registry import REGISTRIES

PUBLIC = {
    "spdfq": """
        Recipe RunResult SpdfqError Teacher diagnose evaluate export load_quantized load_recipe load_teacher quantize
        run synthesize
    """,
    "spdfq.backends": """
        AdaLog AdaRound Blockwise Calibrate Calibration Distill GlobalLocal PowerOfTwoFactors RepQ Ridge Rotate
        Smooth Step quantize
    """,
    "spdfq.calibration_data": """
        CalibrationImages OnnxRuntimeReader Rounding TorchBatches
    """,
    "spdfq.data": """
        Batch DecodedImages FashionMnist ImageFolder ImageList LabelledImages Parquet WebDataset
    """,
    "spdfq.doctor": """
        BlockError Diagnosis Outlier SiteEffect SiteValues Suggestion
    """,
    "spdfq.exporters": """
        DequantizedExporter Exported Exporter OnnxExporter TorchProgramExporter Written write_export
    """,
    "spdfq.inference": """
        Classified Classifier Prediction Preprocessing image_files load
    """,
    "spdfq.losses": """
        AttentionEntropyLoss AttentionPriorLoss CrossEntropyLoss FrequencyConsistencyLoss GaussianMixturePrior
        HeadSimilarityLoss LaplacePrior Loss LossInputs MapPictures MaskedAttentionAlignmentLoss PatchContrastLoss
        PatchSimilarityEntropyLoss Prior SoftCrossEntropyLoss TeacherStudentDiscrepancyLoss TotalVariationLoss
        attention_prior_loss draw_priors
    """,
    "spdfq.losses.functional": """
        attention_entropy attention_prior_loss cross_entropy draw_priors frequency_consistency frequency_split
        head_similarity head_ssim masked_attention_distance patch_contrast patch_similarity_entropy soft_cross_entropy
        teacher_student_discrepancy total_variation
    """,
    "spdfq.quantized": """
        MatmulInputs Psaq QuantizedModel Site WeightsOnly load_quantized place save_quantized
    """,
    "spdfq.quantizers": """
        AdaptiveLogQuantizer DualUniformQuantizer GridMseObserver Log2Quantizer LogSqrt2Quantizer MinMaxObserver
        Observer PercentileMseObserver PowerOfTwoFactorQuantizer Product ProgressiveObserver Quantizer
        RunningMinMaxObserver ShiftUniformLog2Quantizer TwinUniformQuantizer UniformQuantizer learned_scales
    """,
    "spdfq.recipe": """
        Budget Evaluation ModelSpec Override Published PublishedRow Quantization Recipe RuntimeSpec assign_all digest
        load_recipe locate merge merge_parents read resolve shipped to_toml
    """,
    "spdfq.report": """
        check_sheet write_pictures write_report write_sheet
    """,
    "spdfq.runtime": """
        Advance Draws Progress RichProgress Runtime generator make_runtime own_threads pick_device pick_precision
        pick_progress silent
    """,
    "spdfq.teacher": """
        Teacher evaluation_mode load_teacher
    """,
    "spdfq.trackers": """
        Tracked Tracker
    """,
    "spdfq.synth": """
        Adam AdamW Augmentation Change ChannelOffset ColorJitter Constant CropPlan Flip GaussianNoise HighPass Jitter
        LowPass Moment Move MultiSemanticSampler NoTarget OneHotTarget OptimizedImages Optimizer RandomResizedCrop
        RealImages Sampler Schedule SoftLabelTarget Source SpectralAdam StudentTraining SyntheticImages Target
        TokenPruning WarmupCosine WholeImageSampler label_mask
    """,
}
# of modules that also hold names for use inside the library
ALSO_PUBLIC = {
    "spdfq.attention": """
        ATTENTION_OUTPUTS AttentionRecord CLASS_ATTENTION QUERIES_AND_KEYS record_attention
    """,
    "spdfq.errors": """
        ComponentError DataError ModelError NonFiniteError RecipeError SpdfqError
    """,
    "spdfq.evaluation.accuracy": """
        accuracy agreement logits_over
    """,
    "spdfq.evaluation.neighbours": """
        nearest_neighbours similarity
    """,
    "spdfq.registry": """
        REGISTRIES Registration Registry augmentations datasets exporters losses observers optimizers placements priors
        quantizers registry samplers schedules sources steps targets trackers
    """,
    "spdfq.recipe.structure": """
        component component_list components
    """,
}


def public_names(module):
    """What a package exports: its ``__all__``, or the classes and functions it imports."""
    every = getattr(module, "__all__", None)
    return set(
        every or (name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value))
    )


def is_component(value):
    """Whether a value is a registered class; a new one needs no line here."""
    return any(entry.component is value for kind in REGISTRIES.values() for entry in map(kind.entry, kind.names()))


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package):
    module, listed = import_module(package), set(PUBLIC[package].split())
    found = {name for name in public_names(module) if name in listed or not is_component(getattr(module, name))}
    assert found == listed, "a public name came or went: edit the list, the docs and the changelog"


@pytest.mark.parametrize("package", PUBLIC | ALSO_PUBLIC)
def test_the_public_names_can_be_imported(package):
    module = import_module(package)
    assert [name for name in (PUBLIC | ALSO_PUBLIC)[package].split() if not hasattr(module, name)] == []


def test_names_of_the_design_are_importable_where_it_says():
    from spdfq.attention import record_attention
    from spdfq.quantized.checkpoint import save_quantized
    from spdfq.runs.pipeline import check, evaluate_run

    assert all(map(callable, (record_attention, save_quantized, check, evaluate_run)))


def test_the_top_level_names_are_those_of_their_homes():
    assert spdfq.run is import_module("spdfq.runs.pipeline").run
    assert spdfq.quantize is import_module("spdfq.api").quantize
    assert spdfq.Teacher is import_module("spdfq.teacher").Teacher
    assert set(dir(spdfq)) == set(spdfq.__all__) == set(spdfq._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spdfq' has no attribute 'quantise'"):
        _ = spdfq.quantise
