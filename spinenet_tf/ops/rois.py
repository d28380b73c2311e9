"""Regions of interest: proposals, sampling, RoIAlign. Static shapes, XLA-compilable.

Boxes are float32 yxyx in pixels of the network's input.
"""

from typing import NamedTuple

import tensorflow as tf

from spinenet_tf.ops import boxes as box_ops

CANONICAL_SIDE, CANONICAL_LEVEL = 224.0, 4  # a box of 224 px is read from P4 (FPN, eq. 1)


class Samples(NamedTuple):
    """Candidates chosen for a loss, positive ones first.

    Attributes:
      index: [b, k] int32 into the candidates.
      positive: [b, k] bool.
      used: [b, k] bool; the others fill up where there were too few candidates.
    """

    index: tf.Tensor
    positive: tf.Tensor
    used: tf.Tensor


def luck(draws: tf.Tensor, n: int, salt: int) -> tf.Tensor:
    """[b, n] float32 uniform in [0, 1), made from each image's [b, 4] draws and `salt` alone.

    A hash of integers, since TensorFlow's stateless generators give other numbers under XLA.
    """
    first, second = tf.unstack(tf.bitcast(draws[:, :2], tf.uint32), axis=-1)
    image = _hash(first + _hash(second + tf.constant(salt, tf.uint32)))
    place = tf.range(n, dtype=tf.int32)
    mixed = _hash(image[:, None] + _hash(tf.cast(place, tf.uint32))[None])
    top = tf.cast(tf.bitwise.right_shift(mixed, _uint32(8)), tf.int32)  # float32 has 24 bits
    return tf.cast(top, tf.float32) * 2.0**-24


def _hash(x: tf.Tensor) -> tf.Tensor:
    """Mixes the bits of uint32 (xor-shift and multiply, after C. Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(shift))) * _uint32(factor)
    return x


def _uint32(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint32)


def sample(
    positive: tf.Tensor, negative: tf.Tensor, chance: tf.Tensor, size: int, max_positive: int
) -> Samples:
    """Picks `size` of [b, n] candidates at random, up to `max_positive` of them positive.

    Args:
      positive, negative: [b, n] bool, never both; candidates that are neither are not used.
      chance: [b, n] in [0, 1): the highest win.
    """
    lucky = tf.where(positive, chance, -1.0)
    last = tf.math.top_k(lucky, min(max_positive, lucky.shape[1])).values[:, -1:]
    rank = tf.where(positive & (chance >= last), 2.0, tf.where(negative, 1.0, 0.0))
    chance = tf.minimum(chance, 1.0 - 2.0**-22)  # the sum is rounded: not up to the next rank
    order, index = tf.math.top_k(rank + chance, min(size, lucky.shape[1]))
    return Samples(index, order >= 2.0, order >= 1.0)


def propose(
    levels: list[tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    image_sizes: tf.Tensor,
    *,
    before: int,
    after: int,
    iou_threshold: float,
    inclusive: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The best boxes of a region proposal network (Faster R-CNN section 3; per level as in FPN).

    Args:
      levels: for each, logits [b, a], box targets [b, a, 4] (see `boxes.encode`), anchors [a, 4].
      image_sizes: [b, 2] height and width to which boxes are clipped.
      before: candidates of each level that NMS sees.
      after: boxes kept in all.
      inclusive: see `ops.boxes`.

    Returns:
      [b, after, 4] boxes and [b, after] scores in 0..1, best first; what is padding is 0.
    """
    limits = (image_sizes, before, after, iou_threshold, inclusive)
    found = [_propose_level(*level, *limits) for level in levels]
    boxes, scores = (tf.concat(parts, 1) for parts in zip(*found, strict=True))
    missing = max(after - scores.shape[1], 0)
    boxes = tf.pad(boxes, [[0, 0], [0, missing], [0, 0]])
    scores, index = tf.math.top_k(tf.pad(scores, [[0, 0], [0, missing]]), after)
    return tf.gather(boxes, index, batch_dims=1), scores


def _propose_level(logits, targets, anchors, image_sizes, before, after, iou_threshold, inclusive):
    logits, index = tf.math.top_k(logits, min(before, logits.shape[1]))
    targets = tf.gather(targets, index, batch_dims=1)
    boxes = box_ops.decode(targets, tf.gather(anchors, index), inclusive)
    boxes = box_ops.clip(boxes, image_sizes, inclusive)
    scores = tf.sigmoid(logits)
    limit = min(after, scores.shape[1])
    kept, count = tf.image.non_max_suppression_padded(
        boxes, scores, limit, iou_threshold, pad_to_max_output_size=True, sorted_input=True,
        canonicalized_coordinates=True,
    )  # fmt: skip
    boxes = tf.gather(boxes, kept, batch_dims=1)
    # Of inclusive boxes, one of a single row is still a box.
    whole = tf.reduce_any(boxes > 0, -1) if inclusive else box_ops.area(boxes) > 0
    there = (tf.range(limit)[None] < count[:, None]) & whole
    scores = tf.where(there, tf.gather(scores, kept, batch_dims=1), 0.0)
    return tf.where(there[..., None], boxes, 0.0), scores


def pyramid_level(boxes: tf.Tensor, lowest: int, highest: int) -> tf.Tensor:
    """[..., 4] boxes -> [...] int32: the level whose features describe them (FPN, eq. 1)."""
    side = tf.sqrt(tf.maximum(box_ops.area(boxes), 1e-6))
    octaves = tf.floor(tf.math.log(side / CANONICAL_SIDE) / tf.math.log(2.0))
    return tf.clip_by_value(tf.cast(octaves, tf.int32) + CANONICAL_LEVEL, lowest, highest)


def roi_align(features: dict, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """Features of boxes, each read from one level (Mask R-CNN section 3).

    As in the official code, a cell is one bilinear sample at its centre, and row k of a feature map
    lies at k strides (not k + 1/2).

    Args:
      features: {'P3': [b, h, w, c], ...}, levels without gaps, static sizes.
      boxes: [b, n, 4].

    Returns:
      [b, n, size, size, c] in the type of the features.
    """
    levels = sorted(int(name[1:]) for name in features)
    maps = [features[f"P{level}"] for level in levels]
    level = pyramid_level(boxes, levels[0], levels[-1]) - levels[0]  # [b, n], from 0
    stride = tf.gather([float(2**n) for n in levels], level)
    heights, widths = ([m.shape[axis] for m in maps] for axis in (1, 2))
    starts = [
        sum(h * w for h, w in zip(heights[:i], widths, strict=False)) for i in range(len(maps))
    ]
    rows, row_weights = _taps(boxes[..., 0::2] / stride[..., None], tf.gather(heights, level), size)
    columns, column_weights = _taps(
        boxes[..., 1::2] / stride[..., None], tf.gather(widths, level), size
    )
    batch, channels = tf.shape(boxes)[0], maps[0].shape[-1]
    places = sum(h * w for h, w in zip(heights, widths, strict=True))
    flat = tf.concat([tf.reshape(m, [batch, -1, channels]) for m in maps], 1)
    flat = tf.reshape(flat, [-1, channels])
    start, width = (tf.gather(n, level) for n in (starts, widths))
    start += places * tf.range(batch)[:, None]
    cells = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        # Cells first and boxes last, as a TPU keeps small maps: so nothing is moved afterwards.
        row, row_weight, column, column_weight = (
            tf.transpose(v[..., k::2], [2, 0, 1])
            for v, k in ((rows, i), (row_weights, i), (columns, j), (column_weights, j))
        )
        place = start + row[:, None] * width + column[None]
        corner = tf.gather_nd(flat, place[..., None])  # whose gradients are not concatenated
        weight = tf.cast(row_weight[:, None] * column_weight[None], corner.dtype)
        cells.append(corner * weight[..., None])
    return tf.transpose(tf.add_n(cells), [2, 3, 0, 1, 4])


def _taps(span: tf.Tensor, sides: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Bilinear taps of `size` cell centres along one axis.

    Args:
      span: [b, n, 2] start and end of the boxes, in places of their feature map.
      sides: [b, n] int32 places that the map has.

    Returns:
      [b, n, 2 size] int32 places, two a cell, and [b, n, 2 size] float32 weights.
    """
    cells = (tf.range(size, dtype=tf.float32) + 0.5) / size
    at = span[..., :1] + cells * (span[..., 1:] - span[..., :1])  # [b, n, size]
    last = tf.cast(sides, tf.float32)[..., None] - 1.0
    at = tf.clip_by_value(at, 0.0, last)
    low = tf.floor(at)
    places = tf.stack([low, tf.minimum(low + 1.0, last)], -1)
    weights = tf.stack([1.0 - (at - low), at - low], -1)
    shape = [tf.shape(span)[0], span.shape[1], 2 * size]
    return tf.cast(tf.reshape(places, shape), tf.int32), tf.reshape(weights, shape)


def of_class(values: tf.Tensor, classes: tf.Tensor, axis: int) -> tf.Tensor:
    """Picks one class along the `axis` of classes: [b, n, classes, 4], [b, n, 1] -> [b, n, 4].

    A sum, since the gradient of a gather is a scatter, which is slow on a TPU.

    Args:
      values: float, with an axis of classes.
      classes: integers of the shape of the result, or of one that broadcasts to it.
    """
    its_own = tf.one_hot(classes, values.shape[axis], True, False, axis)
    return tf.reduce_sum(tf.where(its_own, values, 0.0), axis)
