"""Encoded images and masks -> pixels: whole on a canvas, or the crop of one object."""

import functools
from collections.abc import Callable

import tensorflow as tf

CROP_MARGIN = 32  # pixels left of 256 by an evaluation crop of 224


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """Encoded JPEG, PNG, GIF (first frame) or BMP -> [h, w, 3] uint8.

    JPEG goes through the accurate DCT, so that training and serving see the same pixels.
    """
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def decode_within(encoded: tf.Tensor, limit: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes an image and reduces it, if its long side is more than `limit` pixels.

    Of JPEGs at least twice as large only a half, a quarter or an eighth is decoded, by the cosine
    transform, and the rest is resized: no whole photo of 50 megapixels is ever made.

    Returns:
      [h, w, 3] uint8 and [2] int32, height and width of the image in its file.
    """
    image, source_size, ratio = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: _decode_jpeg_near(encoded, limit),
        lambda: (*_decode_other(encoded), 1),
    )
    return _reduce(image, source_size, limit, ratio), source_size


def _decode_jpeg_near(encoded: tf.Tensor, limit: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The smallest of four decodings not smaller than `limit`; the size of the file; the ratio."""
    source_size = tf.io.extract_jpeg_shape(encoded)[:2]
    decode = functools.partial(
        tf.io.decode_jpeg, encoded, channels=3, dct_method="INTEGER_ACCURATE"
    )
    times = tf.reduce_max(source_size) // limit
    octave = tf.reduce_sum(tf.cast(times >= [2, 4, 8], tf.int32))
    ratios = [functools.partial(decode, ratio=2**k) for k in range(4)]
    return tf.switch_case(octave, ratios), source_size, 2**octave


def _decode_other(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return image, tf.shape(image)[:2]


def _reduce(
    image: tf.Tensor, source_size: tf.Tensor, limit: int, ratio: tf.Tensor | int = 1
) -> tf.Tensor:
    """Resizes an image of `source_size`, decoded at 1 / `ratio`, so that its long side is `limit`.

    Sides of the decoded image are rounded up, so where its pixels lie follows from the source's.
    """
    shrink = tf.minimum(limit / tf.reduce_max(source_size), 1.0)
    size = tf.cast(tf.round(tf.cast(source_size, tf.float64) * shrink), tf.int32)
    size = tf.maximum(size, 1)

    def resized():
        scale = tf.cast(size * ratio, tf.float32) / tf.cast(source_size, tf.float32)
        pixels = tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(image[None], tf.float32), size=size, scale=scale,
            translation=[0.0, 0.0], kernel_type="triangle", antialias=True,
        )  # fmt: skip
        return tf.saturate_cast(tf.round(pixels[0]), tf.uint8)

    fits = tf.reduce_all(size * ratio == source_size)
    return tf.ensure_shape(tf.cond(fits, lambda: image, resized), [None, None, 3])


def place(image: tf.Tensor, canvas: int) -> dict[str, tf.Tensor]:
    """Puts an image on a square canvas: image, image_size and source_size of a row.

    Args:
      image: [h, w, 3] uint8, or [] string, encoded: what `decode_within` makes of it.
    """
    if image.dtype == tf.string:
        image, source_size = decode_within(image, canvas)
    else:
        source_size = tf.shape(image)[:2]
        image = _reduce(image, source_size, canvas)
    size = tf.shape(image)[:2]
    padding = [[0, canvas - size[0]], [0, canvas - size[1]], [0, 0]]
    image = tf.ensure_shape(tf.pad(image, padding), [canvas, canvas, 3])
    return {"image": image, "image_size": size, "source_size": source_size}


def _resize(image: tf.Tensor, size: tf.Tensor | list[int]) -> tf.Tensor:
    return tf.saturate_cast(tf.round(tf.image.resize(image, size, antialias=True)), tf.uint8)


def random_view(
    encoded: tf.Tensor,
    size: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    seed: tf.Tensor,
) -> tf.Tensor:
    """A crop of random area and shape, as [size, size, 3] uint8, half of the time mirrored.

    The crop is drawn by TensorFlow's `sample_distorted_bounding_box`, which the official code uses:
    width / height uniform in `ratio`, then the height uniform between what the two bounds of `area`
    (shares of the image) ask for, then the place; after ten misfits it is the whole image. Unlike
    there, crops between 8 and 10 % of the image are not refused.

    Args:
      encoded: JPEG, of which only the crop is decoded, or what `decode_image` takes.
      seed: [2] integer: equal seeds, equal views.
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))

    def window(height, width):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.stack([height, width, 3]),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            crop_seed,
            min_object_covered=0.0,
            aspect_ratio_range=ratio,
            area_range=area,
            max_attempts=10,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    image = _square(_decode_window(encoded, window), size)
    if not flip:
        return image
    mirrored = tf.random.stateless_uniform([], flip_seed) < 0.5
    return tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)


def central_view(encoded: tf.Tensor, size: int) -> tf.Tensor:
    """[size, size, 3] uint8 of the central square of size / (size + 32) of the short side.

    The usual evaluation crop: 224 pixels of an image whose short side is resized to 256.
    """
    return _square(_decode_window(encoded, lambda *sides: _central_window(*sides, size)), size)


def central_crop(image: tf.Tensor, size: int) -> tf.Tensor:
    """As `central_view`, of [h, w, 3] uint8, or of [] string, encoded."""
    if image.dtype == tf.string:
        return central_view(image, size)
    window = _central_window(*tf.unstack(tf.shape(image)[:2]), size)
    return _square(_cut(image, window), size)


def _central_window(height: tf.Tensor, width: tf.Tensor, size: int) -> tf.Tensor:
    short = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.maximum(tf.cast(size / (size + CROP_MARGIN) * short, tf.int32), 1)
    return tf.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])


def _cut(image: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    y, x, height, width = tf.unstack(window)
    return image[y : y + height, x : x + width]


def _decode_window(
    encoded: tf.Tensor, window: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Decodes y, x, height, width = window(image height, image width): [h, w, 3] uint8."""

    def jpeg():
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        return tf.io.decode_and_crop_jpeg(
            encoded, window(height, width), channels=3, dct_method="INTEGER_ACCURATE"
        )

    def other():
        image, size = _decode_other(encoded)
        return _cut(image, window(*tf.unstack(size)))

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def _square(image: tf.Tensor, size: int) -> tf.Tensor:
    return tf.ensure_shape(_resize(image, [size, size]), [size, size, 3])


def crop_masks(masks: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """The masks of n objects, each in the frame of its own box.

    Args:
      masks: [n] string, PNGs of the whole image, one channel, 0 where the object is not.
      boxes: [n, 4] float32, yxyx, 0..1; not clipped.
      size: cells of a side.

    Returns:
      [n, size, size] uint8, 0..255: cell (i, j) is the mask, linearly interpolated between pixel
      centres, in the middle of the cell; beyond the image there is no object.
    """

    def one(row):
        mask = tf.minimum(tf.io.decode_png(row[0], channels=1), 1)
        # A border of zeros: crop_and_resize would cut off at the last pixels' centres, and it
        # divides by the image's side - 1.
        mask = tf.pad(mask, [[1, 1], [1, 1], [0, 0]])
        corners = _cell_centres(row[1], tf.shape(mask)[:2], size)
        crop = tf.image.crop_and_resize(mask[None], corners[None], [0], [size, size])
        return tf.cast(tf.round(255.0 * crop[0, ..., 0]), tf.uint8)

    spec = tf.TensorSpec([size, size], tf.uint8)
    return tf.map_fn(one, (masks, boxes), fn_output_signature=spec)


def _cell_centres(box: tf.Tensor, padded: tf.Tensor, size: int) -> tf.Tensor:
    """What crop_and_resize takes to sample at the cells' middles: its corners are samples too."""
    image = tf.cast(padded - 2, tf.float32)
    low, high = box[:2] * image, box[2:] * image
    half = (high - low) / (2 * size)
    # + 1 for the border; - 0.5 as pixel k's centre is k + 0.5 in boxes and k in crop_and_resize.
    corners = tf.stack([low + half, high - half]) + 0.5
    return tf.reshape(corners / (image + 1.0), [4])
