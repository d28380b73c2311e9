"""Scale, crop, flip and normalise on the device: an image is resized by two matrix products.

Static shapes throughout, so the whole of it compiles; the host only decodes. The result is that of
`tf.image.resize` (bilinear, half-pixel centres), then crop, then zero padding. `sample_view` gives
the same on the host, for whoever wants it there.

A TPU rounds the factors of a float32 product to bfloat16, eight bits. Pixels less 128 are then
exact, and what lies between the two products is off by a quarter of a grey level at most, so that
the whole stays within one. Tests round the factors alike.
"""

from typing import NamedTuple

import tensorflow as tf

# ImageNet statistics in 0..1, RGB: what the paper's code and all its checkpoints use.
MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)
MIDDLE = 128.0  # subtracted before the products: makes their bfloat16 errors half as large


class Augmentation(NamedTuple):
    """Random views: of `size` pixels a side, resized by a factor in `scale`, mirrored or not."""

    size: int
    scale: tuple[float, float]
    flip: bool


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


def random_view(image_size: tf.Tensor, augmentation: Augmentation, draws: tf.Tensor) -> View:
    """A random scale around the fit, a random crop if larger, a fair coin for the flip.

    Args:
      image_size: [b, 2] height and width on the canvas.
      draws: [b, 4] float32 in [0, 1): scale, crop y, crop x, flip. Equal draws, equal views.
    """
    size, scale, flip = augmentation
    factor = scale[0] + draws[:, 0] * (scale[1] - scale[0])
    scaled = _scaled(image_size, factor[:, None] * size)
    offset = tf.floor(draws[:, 1:3] * tf.maximum(scaled - size + 1.0, 1.0))
    return View(scaled, offset, (draws[:, 3] < 0.5) & flip)


def identity_view(image_size: tf.Tensor) -> View:
    """[b, 2] images as they are: of host mode, where `sample_view` was the view."""
    zeros = tf.zeros_like(tf.cast(image_size, tf.float32))
    return View(tf.cast(image_size, tf.float32), zeros, zeros[:, 0] > 0)


def extent(view: View, size: int) -> tf.Tensor:
    """[b, 2] float32: height and width of what a view shows of the image; the rest is padding."""
    return tf.minimum(view.scaled - view.offset, float(size))


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
    pixels = tf.cast(images, tf.float32) - MIDDLE
    pixels = tf.einsum("bty,byxc->btxc", rows, pixels)
    pixels = tf.einsum("bux,btxc->btuc", columns, pixels)
    return normalise(pixels + MIDDLE) * _inside(view, size)


def normalise(images: tf.Tensor) -> tf.Tensor:
    """[..., 3] pixels in 0..255, any type -> float32 by the statistics of ImageNet."""
    mean, stddev = (255.0 * tf.constant(c) for c in (MEAN, STDDEV))
    return (tf.cast(images, tf.float32) - mean) / stddev


def multiply_adds(canvas: int, size: int) -> int:
    """Of the two matrix products that make a view of one image."""
    return 3 * size * canvas * (canvas + size)


def sample_view(image: tf.Tensor, image_size: tf.Tensor, view: View, size: int) -> tf.Tensor:
    """What `view_images` shows, on the host and in grey levels: only the pixels that are seen.

    Args:
      image: [h, w, 3] uint8, one image without padding.
      image_size, view: [1, ...], of this image.

    Returns:
      [h', w', 3] uint8; see `extent`.
    """
    seen = tf.cast(extent(view, size)[0], tf.int32)
    source = tf.cast(image_size[0], tf.float32)
    last = tf.cast(seen, tf.float32) - 1.0
    first = _centres(tf.zeros([2]), source, view.scaled[0], view.offset[0])
    last = _centres(last, source, view.scaled[0], view.offset[0])
    mirror = tf.stack([False, view.flip[0]])
    first, last = (tf.where(mirror, source - 1.0 - at, at) for at in (first, last))
    # The edge pixels twice, since crop_and_resize looks at nothing beyond their centres.
    image = tf.concat([image[:1], image, image[-1:]], 0)
    image = tf.concat([image[:, :1], image, image[:, -1:]], 1)
    corners = (tf.stack([first, last]) + 1.0) / (source + 1.0)
    pixels = tf.image.crop_and_resize(image[None], tf.reshape(corners, [1, 4]), [0], seen)
    return tf.saturate_cast(tf.round(pixels[0]), tf.uint8)


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


def _inside(view: View, size: int) -> tf.Tensor:
    """[b, size, size, 1] float32, 1 where a view shows the image and 0 where padding."""
    places = tf.range(size, dtype=tf.float32)
    rows, columns = tf.unstack(tf.cast(places < extent(view, size)[..., None], tf.float32), axis=1)
    return (rows[:, :, None] * columns[:, None, :])[..., None]


def _centres(target, source, scaled, offset) -> tf.Tensor:
    """Where pixels of a view lie in the image: 0 is the centre of its first pixel."""
    return (target + offset + 0.5) * source / scaled - 0.5


def _weights(source, scaled, offset, flip, size: int, canvas: int) -> tf.Tensor:
    """Bilinear weights [b, size, canvas] of one axis; those of padding are any image row's."""
    source = tf.cast(source, tf.float32)[:, None]
    target = tf.range(size, dtype=tf.float32)[None]
    centre = _centres(target, source, scaled[:, None], offset[:, None])  # [b, size]
    centre = tf.where(flip[:, None], source - 1.0 - centre, centre)
    centre = tf.clip_by_value(centre, 0.0, source - 1.0)
    taps = tf.range(canvas, dtype=tf.float32)[None, None]
    return tf.maximum(1.0 - tf.abs(centre[..., None] - taps), 0.0)
