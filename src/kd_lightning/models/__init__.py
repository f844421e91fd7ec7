"""Models, and feature extraction from any model."""

from kd_lightning.models.cifar_resnet import CifarResNet
from kd_lightning.models.convnet import ConvNet
from kd_lightning.models.features import FeatureReader, Output, count_parameters, layer_shapes
from kd_lightning.models.named import timm_model, torchvision_model
from kd_lightning.models.resnet9 import ResNet9
from kd_lightning.models.reused_classifier import ReusedClassifier

__all__ = [
    "CifarResNet",
    "ConvNet",
    "FeatureReader",
    "Output",
    "ResNet9",
    "ReusedClassifier",
    "count_parameters",
    "layer_shapes",
    "timm_model",
    "torchvision_model",
]
