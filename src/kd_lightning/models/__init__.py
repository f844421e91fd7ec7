"""Models, and feature extraction from any model."""

from kd_lightning.models.bottleneck_resnet import BottleneckResNet
from kd_lightning.models.cifar_resnet import CifarResNet
from kd_lightning.models.convnet import ConvNet
from kd_lightning.models.features import FeatureReader, Output, count_parameters, layer_shapes
from kd_lightning.models.mobilenetv2 import MobileNetV2
from kd_lightning.models.named import timm_model, torchvision_model
from kd_lightning.models.projection_resnet import ProjectionResNet
from kd_lightning.models.resnet9 import ResNet9
from kd_lightning.models.reused_classifier import ReusedClassifier
from kd_lightning.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kd_lightning.models.vgg import VGG
from kd_lightning.models.wide_resnet import WideResNet

__all__ = [
    "VGG",
    "BottleneckResNet",
    "CifarResNet",
    "ConvNet",
    "FeatureReader",
    "MobileNetV2",
    "Output",
    "ProjectionResNet",
    "ResNet9",
    "ReusedClassifier",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "count_parameters",
    "layer_shapes",
    "timm_model",
    "torchvision_model",
]
