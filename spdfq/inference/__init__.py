"""Exported files in use: labels and probabilities of images with onnxruntime, NumPy and Pillow, without torch."""

from spdfq.inference.classifier import Classified as Classified
from spdfq.inference.classifier import Classifier as Classifier
from spdfq.inference.classifier import Prediction as Prediction
from spdfq.inference.image_files import image_files as image_files
from spdfq.inference.onnx_file import load as load
from spdfq.inference.preprocessing import Preprocessing as Preprocessing
