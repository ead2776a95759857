"""Labelled images: for evaluation, and for calibration on real ones."""

from spdfq.data.base import Batch, LabelledImages
from spdfq.data.decoded import DecodedImages
from spdfq.data.fashion_mnist import FashionMnist
from spdfq.data.folders import ImageFolder, ImageList
from spdfq.data.parquet import Parquet
from spdfq.data.webdataset import WebDataset

__all__ = [
    "Batch",
    "DecodedImages",
    "FashionMnist",
    "ImageFolder",
    "ImageList",
    "LabelledImages",
    "Parquet",
    "WebDataset",
]
