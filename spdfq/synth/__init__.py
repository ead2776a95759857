"""Sources of calibration images and the parts an optimised one is made of."""

from spdfq.synth.augmentations import Augmentation, Flip, Jitter, RandomResizedCrop
from spdfq.synth.base import Source, SyntheticImages
from spdfq.synth.moves import Change, Moment, Move
from spdfq.synth.optimize import OptimizedImages
from spdfq.synth.optimizers import Adam, AdamW, Constant, Optimizer, Schedule, WarmupCosine
from spdfq.synth.pixels import ChannelOffset, ColorJitter, HighPass, LowPass
from spdfq.synth.pruning import TokenPruning
from spdfq.synth.samplers import CropPlan, MultiSemanticSampler, WholeImageSampler
from spdfq.synth.sources import GaussianNoise, RealImages
from spdfq.synth.spectral import SpectralAdam
from spdfq.synth.student import StudentTraining
from spdfq.synth.targets import NoTarget, OneHotTarget, SoftLabelTarget

__all__ = [
    "Adam",
    "AdamW",
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
    "NoTarget",
    "OneHotTarget",
    "OptimizedImages",
    "Optimizer",
    "RandomResizedCrop",
    "RealImages",
    "Schedule",
    "SoftLabelTarget",
    "Source",
    "SpectralAdam",
    "StudentTraining",
    "SyntheticImages",
    "TokenPruning",
    "WarmupCosine",
    "WholeImageSampler",
]
