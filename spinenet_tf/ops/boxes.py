"""Box geometry. Boxes are [..., 4] float32: ymin, xmin, ymax, xmax in pixels.

Coordinates are edges, so that a side is max - min. With `inclusive` they are the first and the last
pixel, a side is max - min + 1 and the last pixel of an image is its size - 1: what the official
code, and so its checkpoints, take them for when they encode, decode and clip.
"""

import math

import tensorflow as tf

# A box grows at most this much over its anchor: keeps exp() finite (as all Faster R-CNN code does).
LOG_SIZE_LIMIT = math.log(1000.0 / 16.0)


def sizes(boxes: tf.Tensor) -> tf.Tensor:
    """[..., 4] boxes -> [..., 2] height and width, not negative."""
    return tf.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)


def area(boxes: tf.Tensor) -> tf.Tensor:
    """[..., 4] boxes -> [...] square pixels."""
    return tf.reduce_prod(sizes(boxes), axis=-1)


def iou(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Intersection over union: [..., n, 4], [..., m, 4] -> [..., n, m]; 0 if both are empty."""
    return overlap(
        [v[..., :, None] for v in tf.unstack(a, axis=-1)],
        [v[..., None, :] for v in tf.unstack(b, axis=-1)],
        area(a)[..., :, None] + area(b)[..., None, :],
    )


def overlap(a: list[tf.Tensor], b: list[tf.Tensor], areas: tf.Tensor) -> tf.Tensor:
    """`iou` of boxes given as ymin, xmin, ymax, xmax, each [...], and the sums of their areas.

    Coordinate by coordinate: with a last axis of 4, there would be four times the memory traffic.
    """
    height, width = (
        tf.maximum(tf.minimum(a[i + 2], b[i + 2]) - tf.maximum(a[i], b[i]), 0.0) for i in (0, 1)
    )
    intersection = height * width
    return tf.math.divide_no_nan(intersection, areas - intersection)


def encode(boxes: tf.Tensor, anchors: tf.Tensor, inclusive: bool = False) -> tf.Tensor:
    """Regression targets (ty, tx, th, tw) [..., 4] of boxes [..., 4] against anchors [..., 4].

    A side of zero counts as a tiny one, so that the logarithm stays finite.
    """
    shift = centre_form(boxes, inclusive) - centre_form(anchors, inclusive)
    return shift / units(anchors, inclusive)


def centre_form(boxes: tf.Tensor, inclusive: bool = False) -> tf.Tensor:
    """Centre and logarithms of height and width [..., 4] of boxes [..., 4]."""
    boxes = _edges(boxes, inclusive)
    log_sizes = tf.math.log(tf.maximum(sizes(boxes), 1e-8))
    return tf.concat([_centres(boxes), log_sizes], -1)


def units(anchors: tf.Tensor, inclusive: bool = False) -> tf.Tensor:
    """What targets against anchors [..., 4] are measured in, [..., 4]: height, width, 1, 1."""
    sides = sizes(_edges(anchors, inclusive))
    return tf.concat([sides, tf.ones_like(sides)], -1)


def decode(targets: tf.Tensor, anchors: tf.Tensor, inclusive: bool = False) -> tf.Tensor:
    """The inverse of `encode`: [..., 4] targets -> [..., 4] boxes, growth clipped at 1000 / 16."""
    anchors = _edges(anchors, inclusive)
    anchor_sizes = sizes(anchors)
    centres = targets[..., :2] * anchor_sizes + _centres(anchors)
    half = tf.exp(tf.minimum(targets[..., 2:], LOG_SIZE_LIMIT)) * anchor_sizes / 2
    return tf.concat([centres - half, centres + half - float(inclusive)], -1)


def clip(boxes: tf.Tensor, image_sizes: tf.Tensor, inclusive: bool = False) -> tf.Tensor:
    """Clips [b, n, ..., 4] boxes to images of [b, 2] height and width."""
    limits = tf.tile(image_sizes - float(inclusive), [1, 2])
    limits = tf.reshape(limits, [-1, *(1 for _ in boxes.shape[1:-1]), 4])
    return tf.clip_by_value(boxes, 0.0, limits)


def _edges(boxes: tf.Tensor, inclusive: bool) -> tf.Tensor:
    """Boxes of first and last pixels as boxes of edges."""
    return boxes + [0.0, 0.0, 1.0, 1.0] if inclusive else boxes


def _centres(boxes: tf.Tensor) -> tf.Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
