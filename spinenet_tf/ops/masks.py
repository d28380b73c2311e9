"""Instance masks in the frame of a box: targets of regions on the device, pasting on the host."""

import numpy as np
import tensorflow as tf


def crop_masks(masks: tf.Tensor, frames: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """What masks look like in other boxes: two matrix products of bilinear weights.

    Args:
      masks: [b, n, m, m] float32, cell (i, j) at the centre of cell (i, j) of its frame.
      frames: [b, n, 4] yxyx, the boxes that the masks fill.
      boxes: [b, n, 4] yxyx, where to look. Outside its frame a mask is 0.

    Returns:
      [b, n, size, size] float32.
    """
    cells = masks.shape[-1]
    rows = _weights(frames[..., 0::2], boxes[..., 0::2], cells, size)
    columns = _weights(frames[..., 1::2], boxes[..., 1::2], cells, size)
    return tf.einsum("bnik,bnkl,bnjl->bnij", rows, masks, columns)


def _weights(frame: tf.Tensor, box: tf.Tensor, cells: int, size: int) -> tf.Tensor:
    """[b, n, size, cells] weights that read `size` cell centres of a span off its frame's."""
    step = (tf.range(size, dtype=tf.float32) + 0.5) / size
    at = box[..., :1] + step * (box[..., 1:] - box[..., :1])  # [b, n, size], pixels
    extent = tf.maximum(frame[..., 1:] - frame[..., :1], 1e-6)
    place = (at - frame[..., :1]) / extent * cells - 0.5
    taps = tf.range(cells, dtype=tf.float32)
    return tf.maximum(1.0 - tf.abs(place[..., None] - taps), 0.0)


def flip_masks(masks: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    """Mirrors the [b, n, m, m] masks of the images where [b] bool `flip` says so."""
    return tf.where(flip[:, None, None, None], masks[..., ::-1], masks)


def paste_mask(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A predicted mask in its image, bilinear, cut at 1/2.

    Args:
      mask: [m, m] float probabilities, filling `box`.
      box: [4] yxyx pixels; may stick out of the image.

    Returns:
      [height, width] uint8, 1 inside.
    """
    y0, x0, y1, x1 = (float(v) for v in box)
    image = np.zeros([height, width], np.uint8)
    rows = _pixels(y0, y1, height)
    columns = _pixels(x0, x1, width)
    if not len(rows) or not len(columns):
        return image
    down = _read(rows, y0, y1, mask.shape[0])
    across = _read(columns, x0, x1, mask.shape[1])
    inside = down @ mask.astype(np.float64) @ across.T >= 0.5
    image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside
    return image


def _pixels(start: float, end: float, limit: int) -> np.ndarray:
    """The pixels whose centres lie between start and end."""
    first, last = np.ceil(start - 0.5), np.ceil(end - 0.5)
    return np.arange(max(int(first), 0), min(int(last), limit))


def _read(pixels: np.ndarray, start: float, end: float, cells: int) -> np.ndarray:
    """[pixels, cells] bilinear weights; at the border the outermost cell counts alone."""
    place = (pixels + 0.5 - start) / (end - start) * cells - 0.5
    place = np.clip(place, 0, cells - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells)), 0)
