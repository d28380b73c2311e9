"""SpineNet (arXiv 1912.05027) for TensorFlow and Keras 3."""

from spinenet_tf.models.classifier import Classifier
from spinenet_tf.models.fpn import ResNetFPN
from spinenet_tf.models.mask_rcnn import MaskRCNN
from spinenet_tf.models.mobile import SpineNetMobile
from spinenet_tf.models.resnet import ResNet
from spinenet_tf.models.retinanet import RetinaNet
from spinenet_tf.models.spinenet import SpineNet

__all__ = [
    "Classifier",
    "MaskRCNN",
    "ResNet",
    "ResNetFPN",
    "RetinaNet",
    "SpineNet",
    "SpineNetMobile",
    "load_checkpoint",
    "open_checkpoint",
]


def __getattr__(name: str):
    """Loading needs TensorFlow, which the models can do without."""
    if name in ("load_checkpoint", "open_checkpoint"):
        from spinenet_tf.checkpoints import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
