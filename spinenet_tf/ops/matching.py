"""Which ground-truth box an anchor learns. Static shapes: n boxes are padded and masked."""

from typing import NamedTuple

import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops


class Targets(NamedTuple):
    """What every anchor should predict.

    Attributes:
      classes: [b, a] int32; 0 is background.
      boxes: [b, a, 4] float32 regression targets; 0 where there is no object.
      positive: [b, a] bool, the anchors that stand for an object.
    """

    classes: tf.Tensor
    boxes: tf.Tensor
    positive: tf.Tensor


def match(overlap: tf.Tensor, valid: tf.Tensor, threshold: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Assigns boxes to anchors: the best box where the overlap reaches `threshold`, and for every
    valid box also its best anchor (RetinaNet section 4, with the official code's forced match).

    Args:
      overlap: [b, a, n] float32 IoU.
      valid: [b, n] bool; padding is not matched.

    Returns:
      [b, a] int32 index of the box, [b, a] bool whether the anchor is positive. Ties go to the first
      anchor; an anchor that is best for several boxes takes the first of them.
    """
    overlap = tf.where(valid[:, None, :], overlap, -1.0)
    index = tf.argmax(overlap, -1, output_type=tf.int32)
    positive = tf.reduce_max(overlap, -1) >= threshold
    best_anchor = tf.argmax(overlap, 1, output_type=tf.int32)  # [b, n]
    anchor_numbers = tf.range(tf.shape(overlap)[1])[None, :, None]
    forced = (anchor_numbers == best_anchor[:, None, :]) & valid[:, None, :]  # [b, a, n]
    any_forced = tf.reduce_any(forced, -1)
    first_forced = tf.argmax(tf.cast(forced, tf.int8), -1, output_type=tf.int32)
    return tf.where(any_forced, first_forced, index), positive | any_forced


def anchor_targets(
    anchors: tf.Tensor, boxes: tf.Tensor, classes: tf.Tensor, valid: tf.Tensor, threshold: float
) -> Targets:
    """Targets of anchors [a, 4] from padded boxes [b, n, 4], classes [b, n] and valid [b, n]."""
    index, positive = match(box_ops.iou(anchors[None], boxes), valid, threshold)
    matched = tf.gather(boxes, index, batch_dims=1)
    return Targets(
        classes=tf.where(positive, tf.gather(classes, index, batch_dims=1), 0),
        boxes=tf.where(positive[..., None], box_ops.encode(matched, anchors), 0.0),
        positive=positive,
    )
