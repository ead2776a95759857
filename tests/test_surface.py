"""The public names: removing or adding one fails here until these lists are edited."""

import subprocess
import sys
from importlib import import_module

import pytest

import spdfq

PUBLIC = {
    "spdfq": """
        Recipe RunResult SpdfqError Teacher load_quantized load_recipe load_teacher quantize run synthesize
    """,
    "spdfq.backends": """
        AdaLog AdaRound Blockwise Calibrate Calibration Distill MatmulInputs PowerOfTwoFactors Psaq
        QuantizedModel RepQ Ridge Site Step WeightsOnly place quantize
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
    "spdfq.report": "write_pictures write_report write_sheet",
    "spdfq.synth": """
        Adam AdamW Augmentation Change ChannelOffset ColorJitter Constant CropPlan Flip GaussianNoise HighPass Jitter
        LowPass Moment Move MultiSemanticSampler NoTarget OneHotTarget OptimizedImages Optimizer RandomResizedCrop
        RealImages Schedule SoftLabelTarget Source SpectralAdam StudentTraining SyntheticImages TokenPruning
        WarmupCosine WholeImageSampler
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package):
    module = import_module(package)
    assert sorted(module.__all__) == PUBLIC[package].split()
    assert all(getattr(module, name) is not None for name in module.__all__)


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


@pytest.mark.parametrize("statement", ["import spdfq", "from spdfq import Recipe, load_recipe, SpdfqError"])
def test_importing_is_light(statement):
    heavy = "{'torch', 'timm', 'numpy', 'PIL', 'rich'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys; {statement}; print(sorted({heavy}))"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
