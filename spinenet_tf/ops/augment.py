"""Scale, crop, flip and normalise on the device: an image is resized by two matrix products.

Static shapes throughout, so the whole of it compiles; the host only decodes. The result is that of
`tf.image.resize` (bilinear, half-pixel centres), then crop, then zero padding; checked
on CPU. On TPU the products' default precision is that of bfloat16, not checked yet.
"""

from typing import NamedTuple

import tensorflow as tf

# ImageNet statistics in 0..1, RGB: what the paper's code and all its checkpoints use.
MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)


class View(NamedTuple):
    """How a square of `size` pixels looks at an image on its canvas.

    Attributes:
      scaled: [b, 2] float32, height and width the image is resized to.
      offset: [b, 2] float32, top left corner of the crop in the resized image.
      flip: [b] bool, mirrored left to right (before the resize).
    """

    scaled: tf.Tensor
    offset: tf.Tensor
    flip: tf.Tensor


def fit_view(image_size: tf.Tensor, size: int) -> View:
    """The long side of [b, 2] images resized to `size`, the rest padding (section 5.1)."""
    zeros = tf.zeros_like(tf.cast(image_size, tf.float32))
    return View(_scaled(image_size, float(size)), zeros, zeros[:, 0] > 0)


def random_view(
    image_size: tf.Tensor, size: int, scale: tuple[float, float], flip: bool, draws: tf.Tensor
) -> View:
    """A random scale in `scale` around the fit, a random crop if larger, a fair coin for the flip.

    Args:
      image_size: [b, 2] height and width on the canvas.
      draws: [b, 4] float32 in [0, 1): scale, crop y, crop x, flip. Equal draws, equal views.
    """
    factor = scale[0] + draws[:, 0] * (scale[1] - scale[0])
    scaled = _scaled(image_size, factor[:, None] * size)
    offset = tf.floor(draws[:, 1:3] * tf.maximum(scaled - size + 1.0, 1.0))
    return View(scaled, offset, (draws[:, 3] < 0.5) & flip)


def view_images(images: tf.Tensor, image_size: tf.Tensor, view: View, size: int) -> tf.Tensor:
    """[b, s, s, 3] uint8 canvases -> [b, size, size, 3] float32, normalised, padding 0."""
    no_flip = tf.zeros_like(view.flip)
    canvas = images.shape[1:3]
    rows = _weights(
        image_size[:, 0], view.scaled[:, 0], view.offset[:, 0], no_flip, size, canvas[0]
    )
    columns = _weights(
        image_size[:, 1], view.scaled[:, 1], view.offset[:, 1], view.flip, size, canvas[1]
    )
    pixels = tf.cast(images, tf.float32)
    pixels = tf.einsum("bty,byxc->btxc", rows, pixels)
    pixels = tf.einsum("bux,btxc->btuc", columns, pixels)
    inside = tf.reduce_sum(rows, -1)[:, :, None] * tf.reduce_sum(columns, -1)[:, None, :]
    mean, stddev = (255.0 * tf.constant(c) for c in (MEAN, STDDEV))
    return (pixels - mean * inside[..., None]) / stddev


def view_boxes(boxes: tf.Tensor, image_size: tf.Tensor, view: View) -> tf.Tensor:
    """[b, n, 4] canvas boxes -> [b, n, 4] boxes in the view, not clipped."""
    image_size = tf.cast(image_size, tf.float32)
    y0, x0, y1, x1 = tf.unstack(boxes, axis=-1)
    width = image_size[:, 1:]
    flip = view.flip[:, None]
    x0, x1 = tf.where(flip, width - x1, x0), tf.where(flip, width - x0, x1)
    boxes = tf.stack([y0, x0, y1, x1], -1)
    scale = tf.tile(view.scaled / image_size, [1, 2])[:, None]
    return boxes * scale - tf.tile(view.offset, [1, 2])[:, None]


def _scaled(image_size: tf.Tensor, long_side) -> tf.Tensor:
    image_size = tf.cast(image_size, tf.float32)
    ratio = long_side / tf.reduce_max(image_size, -1, keepdims=True)
    return tf.maximum(tf.round(image_size * ratio), 1.0)


def _weights(source, scaled, offset, flip, size: int, canvas: int) -> tf.Tensor:
    """Bilinear weights [b, size, canvas] of one axis; rows outside the image are zero."""
    source = tf.cast(source, tf.float32)[:, None]
    scaled, offset, flip = scaled[:, None], offset[:, None], flip[:, None]
    target = tf.range(size, dtype=tf.float32)[None] + offset  # [b, size], in the resized image
    centre = (target + 0.5) * source / scaled - 0.5
    centre = tf.where(flip, source - 1.0 - centre, centre)
    centre = tf.clip_by_value(centre, 0.0, source - 1.0)
    taps = tf.range(canvas, dtype=tf.float32)[None, None]
    weights = tf.maximum(1.0 - tf.abs(centre[..., None] - taps), 0.0)
    return tf.where((target < scaled)[..., None], weights, 0.0)
