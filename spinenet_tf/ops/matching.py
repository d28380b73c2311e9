"""Which ground-truth box an anchor learns. Static shapes: n boxes are padded and masked."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops


class Targets(NamedTuple):
    """What every anchor should predict.

    Attributes:
      classes: [b, a] int32; 0 is background.
      object: [b, a] int32, which box; see `box_targets`.
      positive: [b, a] bool, the anchors that stand for an object.
    """

    classes: tf.Tensor
    object: tf.Tensor
    positive: tf.Tensor


def match(overlap: tf.Tensor, valid: tf.Tensor, threshold: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Assigns boxes to anchors: the best box where the overlap reaches `threshold`, and for every
    valid box also its best anchor (RetinaNet section 4, with the official code's forced match).

    Args:
      overlap: [b, a, n] float32 IoU.
      valid: [b, n] bool; padding is not matched.

    Returns:
      [b, a] int32 index of the box, [b, a] bool whether the anchor is positive. Ties go to the
      first anchor; an anchor that is best for several boxes takes the first of them.
    """
    overlap = tf.where(valid[:, None, :], overlap, -1.0)
    index = tf.argmax(overlap, -1, output_type=tf.int32)
    positive = tf.reduce_max(overlap, -1) >= threshold
    forced = _forced(tf.argmax(overlap, 1, output_type=tf.int32), valid, tf.shape(overlap)[1])
    is_forced = forced < tf.shape(valid)[1]
    return tf.where(is_forced, forced, index), positive | is_forced


def _forced(best_anchor: tf.Tensor, valid: tf.Tensor, anchors: tf.Tensor) -> tf.Tensor:
    """[b, n] best anchor of each box -> [b, anchors] first box that an anchor is best for, else n.

    A scatter of b * n numbers: comparing all pairs would cost as much as the overlaps themselves.
    """
    batch, n = tf.unstack(tf.shape(valid))
    box = tf.where(valid, tf.range(n)[None], n)
    rows = tf.broadcast_to(tf.range(batch)[:, None], [batch, n])
    nobody = tf.fill([batch, anchors], n)
    return tf.tensor_scatter_nd_min(nobody, tf.stack([rows, best_anchor], -1), box)


def anchor_targets(
    anchors: tf.Tensor,
    boxes: tf.Tensor,
    classes: tf.Tensor,
    valid: tf.Tensor,
    threshold: float,
) -> Targets:
    """Targets of anchors [a, 4] from padded boxes [b, n, 4], valid [b, n], classes [b, >= n]."""
    index, positive = match(box_ops.iou(anchors[None], boxes), valid, threshold)
    classes = tf.where(positive, tf.gather(classes, index, batch_dims=1), 0)
    return Targets(classes, index, positive)


def box_targets(
    boxes: tf.Tensor, index: tf.Tensor, anchors: np.ndarray, inclusive: bool = False
) -> tf.Tensor:
    """Regression targets of k anchors at each place.

    Args:
      boxes: [b, n, 4]. index: [b, ..., k] int32, which box an anchor is for; below 65536.
      anchors: [..., k, 4].

    Returns:
      [b, ..., k * 4], the coordinates of an anchor side by side, as in a prediction: gathered so,
      since four alone would fill 4 of a TPU's 128 lanes, and moving them costs more than the rest.
    """
    k, n = index.shape[-1], boxes.shape[1]
    coordinate = np.tile(np.arange(4), k)
    place = tf.cast(spread(index, 4), tf.int32) * 4 + coordinate
    objects = tf.reshape(box_ops.centre_form(boxes, inclusive), [-1, n * 4])
    flat = [*anchors.shape[:-2], k * 4]
    origin, unit = (
        tf.reshape(part(tf.constant(anchors), inclusive), flat)
        for part in (box_ops.centre_form, box_ops.units)
    )
    return (tf.gather(objects, place, batch_dims=1) - origin) / unit


def one_hot(classes: tf.Tensor, num_classes: int) -> tf.Tensor:
    """[..., k] int32 classes of anchors -> [..., k * num_classes] bool, True at each one's class.

    Class 0, the background, is nowhere True. The channels of an anchor lie side by side, as in a
    prediction.
    """
    label = np.tile(np.arange(num_classes, dtype=np.float32), classes.shape[-1])
    return spread(classes, num_classes) == np.where(label > 0, label, -1.0)


def spread(values: tf.Tensor, times: int) -> tf.Tensor:
    """[..., k] int32 below 65536 -> [..., k * times] float32, each number `times` times.

    By a matrix product, since that moves nothing: of two digits to the base of 256, which bfloat16
    holds exactly.
    """
    copies = np.repeat(np.eye(values.shape[-1], dtype=np.float32), times, axis=1)
    digits = tf.cast(tf.concat([values // 256, values % 256], -1), tf.float32)
    return tf.tensordot(digits, tf.constant(np.concatenate([256 * copies, copies])), 1)
