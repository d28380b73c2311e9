"""Class-wise non-maximum suppression, with static shapes for TPU or by TensorFlow's CPU kernel."""

from typing import NamedTuple

import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops


class Detections(NamedTuple):
    """The k best objects of each image, best first; rows from `count` on are zero.

    Attributes:
      boxes: [b, k, 4] float32 yxyx.
      scores: [b, k] float32 in 0..1.
      classes: [b, k] int32, from 1.
      count: [b] int32.
    """

    boxes: tf.Tensor
    scores: tf.Tensor
    classes: tf.Tensor
    count: tf.Tensor


def native_nms(boxes, scores, *, limit: int, iou_threshold: float, score_threshold: float):
    """As `static_nms`, through `tf.image.combined_non_max_suppression`: CPU only, no XLA."""
    found = tf.image.combined_non_max_suppression(
        boxes[:, :, None] if boxes.shape.rank == 3 else boxes,
        scores,
        limit,
        limit,
        iou_threshold,
        score_threshold,
        clip_boxes=False,
    )
    classes = tf.cast(found.nmsed_classes, tf.int32) + 1
    there = tf.range(limit)[None] < found.valid_detections[:, None]
    return Detections(
        found.nmsed_boxes, found.nmsed_scores, tf.where(there, classes, 0), found.valid_detections
    )


def static_nms(boxes, scores, *, limit: int, iou_threshold: float, score_threshold: float):
    """Greedy class-wise NMS in `limit` rounds; XLA-compilable.

    A round takes the best score left in an image over all classes, and strikes out what overlaps
    it in its own class. The first `limit` picks are exactly the best `limit` of class-wise NMS, so
    no loop over classes and no top-k is needed: a round touches one class of each image.

    Args:
      boxes: [b, a, 4] float32 yxyx, shared by the classes, or [b, a, k, 4], one for each.
      scores: [b, a, k] float32; column i is class i + 1 (the background is not there).
      limit: detections per image.
      iou_threshold: overlaps above it are struck out.
      score_threshold: scores at or below it are no detections.

    Returns:
      Detections. Of equal scores the lower class comes first, then the lower anchor.
    """
    by_class = tf.transpose(tf.where(scores > score_threshold, scores, 0.0), [0, 2, 1])  # [b, k, a]
    shared = boxes.shape.rank == 3
    boxes = boxes if shared else tf.transpose(boxes, [0, 2, 1, 3])  # [b, k, a, 4]
    batch = tf.shape(boxes)[0]
    state = (by_class, tf.reduce_max(by_class, -1), *_empty(batch, limit))

    def pick(step, state):
        left, best, *found = state
        label = tf.argmax(best, -1, output_type=tf.int32)  # [b]
        where = tf.stack([tf.range(batch), label], -1)  # [b, 2]
        row = tf.gather_nd(left, where)  # [b, a]
        anchor = tf.argmax(row, -1, output_type=tf.int32)
        score = tf.gather(row, anchor, batch_dims=1)  # [b]
        of_class = boxes if shared else tf.gather_nd(boxes, where)  # [b, a, 4]
        box = tf.gather(of_class, anchor, batch_dims=1)  # [b, 4]
        overlap = box_ops.iou(box[:, None], of_class)[:, 0]  # [b, a]
        picked = tf.range(tf.shape(row)[1])[None] == anchor[:, None]
        row = tf.where((overlap > iou_threshold) | picked, 0.0, row)
        left = tf.tensor_scatter_nd_update(left, where, row)
        best = tf.tensor_scatter_nd_update(best, where, tf.reduce_max(row, -1))
        picks = (box, score, tf.where(score > 0, label + 1, 0))
        found = [_put(all_, pick, step, score) for all_, pick in zip(found, picks, strict=True)]
        return step + 1, (left, best, *found)

    _, (_, _, *found) = tf.while_loop(
        lambda step, _: step < limit, pick, (0, state), maximum_iterations=limit
    )
    count = tf.reduce_sum(tf.cast(found[1] > 0, tf.int32), -1)
    return Detections(*found, count)


def _empty(batch, limit: int):
    return (
        tf.zeros([batch, limit, 4]),
        tf.zeros([batch, limit]),
        tf.zeros([batch, limit], tf.int32),
    )


def _put(found, pick, step, score):
    """Writes [b, ...] picks to column `step` of [b, limit, ...], nothing where the score is 0."""
    here = tf.range(found.shape[1]) == step
    here = here[None, :] & (score > 0)[:, None]
    if pick.shape.rank == 2:
        here, pick = here[..., None], pick[:, None, :]
    else:
        pick = pick[:, None]
    return tf.where(here, pick, found)
