"""Class-wise non-maximum suppression, with static shapes for TPU or by TensorFlow's CPU kernel."""

from typing import NamedTuple

import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops

CANDIDATES = 1024
GROUP = 8


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


class Pairs(NamedTuple):
    """Boxes with a class each, of every image of a batch.

    Attributes:
      boxes: ymin, xmin, ymax, xmax, each [b, c].
      areas: [b, c].
      scores: [b, c], best first.
      classes: [b, c] int32, from 1.
      order: [b, c] int32: of equal scores the lowest comes first.
    """

    boxes: list[tf.Tensor]
    areas: tf.Tensor
    scores: tf.Tensor
    classes: tf.Tensor
    order: tf.Tensor


def static_nms(
    boxes,
    scores,
    *,
    limit: int,
    iou_threshold: float,
    score_threshold: float,
    candidates: int = CANDIDATES,
):
    """Greedy class-wise NMS, exact, with static shapes; XLA-compilable.

    Of all pairs of a box and a class, the best `candidates` of an image are looked at, all classes
    together: the first `limit` picks of them are the best `limit` of class-wise NMS. Where they do
    not suffice, the next best follow, so that `candidates` changes the time and not the result.

    Args:
      boxes: [b, a, 4] float32 yxyx, shared by the classes, or [b, a, k, 4], one for each.
      scores: [b, a, k] float32; column i is class i + 1 (the background is not there).
      limit: detections per image.
      iou_threshold: overlaps above it are struck out.
      score_threshold: scores at or below it are no detections; not negative.
      candidates: pairs that are looked at together.

    Returns:
      Detections. Of equal scores the lower class comes first, then the lower anchor. Only of more
      than `candidates` pairs of one and the same score some are not looked at.
    """
    batch, pairs = tf.shape(scores)[0], scores.shape[1] * scores.shape[2]
    size = min(candidates, pairs)

    def look_at_next(below, done, found):
        block = _best_pairs(boxes, scores, below, size)
        highest, lowest = block.scores[:, 0], block.scores[:, -1]
        # Of those that are as good as the last, some may be missing: they wait for the next block.
        last = (lowest <= score_threshold) | (size == pairs)
        from_ = tf.where(last | (highest == lowest), score_threshold, lowest)
        left = tf.where(block.scores > from_[:, None], block.scores, 0.0)
        found = _pick(block._replace(scores=left), found, iou_threshold)
        below = tf.where(highest == lowest, lowest, tf.math.nextafter(lowest, 2.0))
        return below, last | (found.count == limit), found

    state = (tf.fill([batch], 2.0), tf.fill([batch], False), _nothing(batch, limit))
    return tf.while_loop(lambda _, done, __: ~tf.reduce_all(done), look_at_next, state)[-1]


def _best_pairs(boxes, scores, below, size: int) -> Pairs:
    """The `size` best pairs of a box and a class with scores less than [b] `below`."""
    anchors, classes = scores.shape[1:]
    under = below[:, None, None]
    # A box with one of the best pairs is one of as many best boxes: sorts few instead of all.
    best = tf.reduce_max(tf.where(scores < under, scores, 0.0), -1)
    _, rows = top(best, min(size, anchors))
    of_rows = tf.gather(scores, rows, batch_dims=1)
    of_rows = tf.where(of_rows < under, of_rows, 0.0)
    values, index = top(tf.reshape(of_rows, [-1, rows.shape[1] * classes]), size)
    label, anchor = index % classes, tf.gather(rows, index // classes, batch_dims=1)
    if boxes.shape.rank == 3:
        boxes = tf.gather(boxes, anchor, batch_dims=1)
    else:
        boxes = tf.reshape(boxes, [-1, anchors * classes, 4])
        boxes = tf.gather(boxes, anchor * classes + label, batch_dims=1)
    order = label * anchors + anchor
    return Pairs(tf.unstack(boxes, axis=-1), box_ops.area(boxes), values, label + 1, order)


def top(values: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k best of [b, n] values, not negative, in order, and their indices: [b, k] each.

    A TPU sorts all to find them. So of many, groups are sorted by their best ones: the k best
    values lie in the k best groups. Of equal values any may come first.
    """
    n = values.shape[1]
    if n <= 2 * GROUP * k:
        return tf.math.top_k(values, k)
    count = -(-n // GROUP)
    groups = tf.pad(values, [[0, 0], [0, count * GROUP - n]], constant_values=-1.0)
    groups = tf.reshape(groups, [-1, GROUP, count])  # a group is a column
    best = tf.math.top_k(tf.reduce_max(groups, 1), k).indices
    members = tf.gather(tf.transpose(groups, [0, 2, 1]), best, batch_dims=1)
    found, place = tf.math.top_k(tf.reshape(members, [-1, k * GROUP]), k)
    group = tf.gather(best, place // GROUP, batch_dims=1)
    return found, place % GROUP * count + group


def _pick(block: Pairs, found: Detections, iou_threshold: float) -> Detections:
    """Adds the greedy picks of a block, in which a score of 0 is none, to what was found before."""
    limit = found.scores.shape[1]
    struck = box_ops.iou(tf.stack(block.boxes, -1), found.boxes) > iou_threshold
    struck &= block.classes[..., None] == found.classes[:, None]
    left = tf.where(tf.reduce_any(struck, -1), 0.0, block.scores)

    def round_(step, left, found):
        score = tf.where(found.count < limit, tf.reduce_max(left, -1), 0.0)[:, None]
        first = tf.reduce_min(tf.where(left == score, block.order, block.order.dtype.max), -1)
        picked = block.order == first[:, None]
        *box, area, label = (_at(picked, v) for v in (*block.boxes, block.areas, block.classes))
        struck = box_ops.overlap(block.boxes, box, block.areas + area) > iou_threshold
        left = tf.where((struck & (block.classes == label)) | picked, 0.0, left)
        return step + 1, left, _put(found, tf.concat(box, -1), score, label)

    return tf.while_loop(
        lambda step, *_: step < limit, round_, (0, left, found), maximum_iterations=limit
    )[-1]


def _at(picked, values):
    """[b, 1]: the one of [b, c] values that is picked. A sum, as a TPU gathers slowly."""
    return tf.reduce_sum(tf.where(picked, values, tf.zeros([], values.dtype)), -1, keepdims=True)


def _nothing(batch, limit: int) -> Detections:
    return Detections(
        tf.zeros([batch, limit, 4]),
        tf.zeros([batch, limit]),
        tf.zeros([batch, limit], tf.int32),
        tf.zeros([batch], tf.int32),
    )


def _put(found: Detections, box, score, label) -> Detections:
    """Appends a pick of [b, 1] score and label and [b, 4] box, where the score is not 0."""
    here = (tf.range(found.scores.shape[1])[None] == found.count[:, None]) & (score > 0)
    return Detections(
        boxes=tf.where(here[..., None], box[:, None], found.boxes),
        scores=tf.where(here, score, found.scores),
        classes=tf.where(here, label, found.classes),
        count=found.count + tf.cast(score[:, 0] > 0, tf.int32),
    )
