"""Labelled images, for evaluation and for calibration on real images."""

from spdfq.data.base import Batch as Batch
from spdfq.data.base import LabelledImages as LabelledImages
from spdfq.data.decoded import DecodedImages as DecodedImages
from spdfq.data.fashion_mnist import FashionMnist as FashionMnist
from spdfq.data.folders import ImageFolder as ImageFolder
from spdfq.data.folders import ImageList as ImageList
from spdfq.data.parquet import Parquet as Parquet
from spdfq.data.webdataset import WebDataset as WebDataset
