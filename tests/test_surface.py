"""The public names: removing or adding one fails here until these lists are edited."""

from importlib import import_module

import pytest

import spdfq

PUBLIC = {
    "spdfq": """
        Recipe RunResult SpdfqError Teacher load_quantized load_recipe load_teacher quantize run synthesize
    """,
    "spdfq.backends": """
        AdaLog AdaRound Blockwise Calibrate Calibration Distill MatmulInputs PowerOfTwoFactors Psaq QuantizedModel
        RepQ Ridge Site Step WeightsOnly place quantize
    """,
    "spdfq.losses": """
        AttentionEntropyLoss AttentionPriorLoss CrossEntropyLoss FrequencyConsistencyLoss GaussianMixturePrior
        HeadSimilarityLoss LaplacePrior Loss LossInputs MaskedAttentionAlignmentLoss PatchContrastLoss
        PatchSimilarityEntropyLoss SoftCrossEntropyLoss TeacherStudentDiscrepancyLoss TotalVariationLoss
    """,
    "spdfq.losses.functional": """
        attention_entropy attention_prior_loss cross_entropy frequency_consistency frequency_split head_similarity
        head_ssim masked_attention_distance patch_contrast patch_similarity_entropy soft_cross_entropy
        teacher_student_discrepancy total_variation
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
    "spdfq.synth": """
        Adam AdamW Augmentation Change ChannelOffset ColorJitter Constant CropPlan Flip GaussianNoise HighPass Jitter
        LowPass Moment Move MultiSemanticSampler NoTarget OneHotTarget OptimizedImages Optimizer RandomResizedCrop
        RealImages Schedule SoftLabelTarget Source SpectralAdam StudentTraining SyntheticImages TokenPruning
        WarmupCosine WholeImageSampler
    """,
}
# of modules without an __all__
ALSO_PUBLIC = {
    "spdfq.attention": """
        ATTENTION_OUTPUTS AttentionRecord CLASS_ATTENTION QUERIES_AND_KEYS record_attention
    """,
    "spdfq.data": """
        Batch DecodedImages FashionMnist ImageFolder ImageList LabelledImages Parquet WebDataset
    """,
    "spdfq.errors": """
        DataError ModelError NonFiniteError RecipeError SpdfqError
    """,
    "spdfq.evaluate": """
        accuracy agreement logits_over
    """,
    "spdfq.features": """
        nearest_neighbours similarity
    """,
    "spdfq.models": """
        Teacher load_teacher
    """,
    "spdfq.registry": """
        REGISTRIES Registration Registry augmentations datasets losses observers optimizers placements priors
        quantizers registry samplers schedules sources steps targets
    """,
    "spdfq.runtime": """
        Runtime generator make_runtime rich_progress silent
    """,
    "spdfq.structure": """
        component component_list components
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package):
    found = sorted(import_module(package).__all__)
    assert found == PUBLIC[package].split(), "a public name came or went: edit the list, the docs and the changelog"


@pytest.mark.parametrize("package", PUBLIC | ALSO_PUBLIC)
def test_the_public_names_can_be_imported(package):
    module = import_module(package)
    assert [name for name in (PUBLIC | ALSO_PUBLIC)[package].split() if not hasattr(module, name)] == []


def test_names_of_the_design_are_importable_where_it_says():
    from spdfq.attention import record_attention
    from spdfq.checkpoint import save_quantized
    from spdfq.pipeline import check, evaluate_run

    assert all(map(callable, (record_attention, save_quantized, check, evaluate_run)))


def test_the_top_level_names_are_those_of_their_homes():
    assert spdfq.run is import_module("spdfq.pipeline").run
    assert spdfq.quantize is import_module("spdfq.api").quantize
    assert spdfq.Teacher is import_module("spdfq.models").Teacher
    assert set(dir(spdfq)) == set(spdfq.__all__) == set(spdfq._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spdfq' has no attribute 'quantise'"):
        _ = spdfq.quantise
