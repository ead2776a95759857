"""Sources of calibration images and the parts an optimised one is made of."""

from spdfq.synth.augmentations import Augmentation, Flip, Jitter, RandomResizedCrop
from spdfq.synth.base import Source, SyntheticImages
from spdfq.synth.moves import Change, Moment, Move
from spdfq.synth.optimize import OptimizedImages
from spdfq.synth.optimizers import Adam, Constant, WarmupCosine
from spdfq.synth.pixels import ChannelOffset, ColorJitter, HighPass, LowPass
from spdfq.synth.samplers import CropPlan, MultiSemanticSampler, WholeImageSampler
from spdfq.synth.sources import GaussianNoise, RealImages
from spdfq.synth.targets import OneHotTarget, SoftLabelTarget

__all__ = [
    "Adam",
    "Augmentation",
    "Change",
    "ChannelOffset",
    "ColorJitter",
    "Constant",
    "CropPlan",
    "Flip",
    "GaussianNoise",
    "HighPass",
    "Jitter",
    "LowPass",
    "Moment",
    "Move",
    "MultiSemanticSampler",
    "OneHotTarget",
    "OptimizedImages",
    "RandomResizedCrop",
    "RealImages",
    "SoftLabelTarget",
    "Source",
    "SyntheticImages",
    "WarmupCosine",
    "WholeImageSampler",
]
