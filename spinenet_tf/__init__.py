from spinenet_tf.models.retinanet import RetinaNet
from spinenet_tf.models.spinenet import SpineNet

__all__ = ["RetinaNet", "SpineNet"]
