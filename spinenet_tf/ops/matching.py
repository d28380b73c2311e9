"""Which ground-truth box an anchor learns. Static shapes: n boxes are padded and masked."""

from typing import NamedTuple

import numpy as np
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
    inclusive: bool = False,
) -> Targets:
    """Targets of anchors [a, 4] from padded boxes [b, n, 4], classes [b, n] and valid [b, n].

    `inclusive`: see `ops.boxes`.
    """
    index, positive = match(box_ops.iou(anchors[None], boxes), valid, threshold)
    matched = tf.gather(boxes, index, batch_dims=1)
    return Targets(
        classes=tf.where(positive, tf.gather(classes, index, batch_dims=1), 0),
        boxes=tf.where(positive[..., None], box_ops.encode(matched, anchors, inclusive), 0.0),
        positive=positive,
    )


def one_hot(classes: tf.Tensor, num_classes: int) -> tf.Tensor:
    """[..., k] int32 classes of anchors -> [..., k * num_classes] bool, True at each one's class.

    Class 0, the background, is nowhere True. The channels of an anchor lie side by side, as in a
    prediction. A matrix product spreads the classes over them, since that moves nothing: of two
    digits to the base of 256, which bfloat16 holds exactly.
    """
    k = classes.shape[-1]
    spread = np.repeat(np.eye(k, dtype=np.float32), num_classes, axis=1)
    label = np.tile(np.arange(num_classes, dtype=np.float32), k)
    digits = tf.cast(tf.concat([classes // 256, classes % 256], -1), tf.float32)
    of_anchor = tf.tensordot(digits, tf.constant(np.concatenate([256 * spread, spread])), 1)
    return of_anchor == np.where(label > 0, label, -1.0)
