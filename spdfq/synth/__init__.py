"""Sources of calibration images and the parts an optimised one is made of."""

from spdfq.synth.augmentations import Flip, Jitter, Move
from spdfq.synth.base import Source, SyntheticImages
from spdfq.synth.optimize import OptimizedImages
from spdfq.synth.optimizers import Adam, Constant, WarmupCosine
from spdfq.synth.samplers import CropPlan, MultiSemanticSampler, WholeImageSampler
from spdfq.synth.sources import GaussianNoise, RealImages
from spdfq.synth.targets import OneHotTarget, SoftLabelTarget

__all__ = [
    "Adam",
    "Constant",
    "CropPlan",
    "Flip",
    "GaussianNoise",
    "Jitter",
    "Move",
    "MultiSemanticSampler",
    "OneHotTarget",
    "OptimizedImages",
    "RealImages",
    "SoftLabelTarget",
    "Source",
    "SyntheticImages",
    "WarmupCosine",
    "WholeImageSampler",
]
