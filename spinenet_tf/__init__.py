"""SpineNet (arXiv 1912.05027) for TensorFlow and Keras 3."""

from spinenet_tf.models.retinanet import RetinaNet
from spinenet_tf.models.spinenet import SpineNet

__all__ = ["RetinaNet", "SpineNet"]
