"""Maps cut into strips of rows: [b, h, w, c] -> [b * n, h / n, w, c], n strips of an image.

A TPU works on 8 images of a batch at once, and takes about as long for 2, since it has their places
side by side in a register. So a device with few images gets strips of them. Only where a 3x3
convolution looks over a strip's edge do the strips differ from images: `Halo`.
"""

import keras
from keras import ops

from spinenet_tf.models.device import images_at_once

AT_ONCE = 8  # images, or strips of them
LEAST_ROWS = 4  # of a strip, which has 2 more for every 3x3 convolution


def strips_of(height: int | None) -> int:
    """Into how many strips maps of this height are cut: 1 if not on a TPU, or with many images."""
    images = images_at_once()
    strips = AT_ONCE // images if images in (1, 2, 4) else 1
    fits = height and height % strips == 0 and height // strips >= LEAST_ROWS
    return strips if fits else 1


def cut(x, strips: int):
    """[b, h, w, c] -> [b * strips, h / strips, w, c]."""
    return x if strips == 1 else Rows(x.shape[1] // strips)(x)


def join(x, strips: int):
    """[b * strips, h / strips, w, c] -> [b, h, w, c]."""
    return x if strips == 1 else Rows(x.shape[1] * strips)(x)


def recut(x, before: int, after: int):
    """From a number of strips to another."""
    return x if before == after else cut(join(x, before), after)


def strips_of_pyramid(features: dict) -> tuple[dict, str]:
    """{level: strips} of {level: [b, h, w, c]}, and the padding of 3x3 convolutions of them all.

    Which is 'valid' if there are strips on any level; see `around`.
    """
    known = {level: x.shape[1] if x.shape[2] else None for level, x in features.items()}
    strips = {level: strips_of(height) for level, height in known.items()}
    return strips, "same" if max(strips.values()) == 1 else "valid"


def around(x, strips: int, padding: str):
    """What a 3x3 convolution with this padding is to see."""
    return x if padding == "same" else Halo(strips, (1, 1), (1, 1))(x)


@keras.saving.register_keras_serializable("spinenet_tf")
class Rows(keras.layers.Layer):
    """[b, h, w, c] -> [b * h / rows, rows, w, c]: images of as many rows, cut or joined."""

    def __init__(self, rows: int, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def call(self, x):
        return ops.reshape(x, [-1, self.rows, *x.shape[2:]])

    def compute_output_shape(self, shape):
        batch = shape[0] and shape[0] * shape[1] // self.rows
        return (batch, self.rows, *shape[2:])

    def get_config(self):
        return super().get_config() | {"rows": self.rows}


def row_beside(x, strips: int, *, above: bool, fill: float = 0.0):
    """The row above, or below, each strip [b * strips, h, w, c]: [b * strips, 1, w, c].

    Args:
      fill: what there is beyond the edge of an image.
    """
    rows = ops.reshape(x[:, -1] if above else x[:, 0], [-1, strips, *x.shape[2:]])
    rows = ops.pad(rows, [[0, 0], [1, 1], [0, 0], [0, 0]], constant_values=fill)
    rows = rows[:, :-2] if above else rows[:, 2:]
    return ops.reshape(rows, [-1, 1, *x.shape[2:]])


@keras.saving.register_keras_serializable("spinenet_tf")
class Halo(keras.layers.Layer):
    """Pads strips with rows of their neighbours, or zeros at an image's edge, and columns of zeros.

    Call arguments: [b * strips, h, w, c]; returns [b * strips, h + above + below, w + left + right,
    c].

    Args:
      rows: (above, below), 0 or 1 each.
      columns: (left, right).
    """

    def __init__(self, strips: int, rows: tuple[int, int], columns: tuple[int, int], **kwargs):
        super().__init__(**kwargs)
        self.strips, self.rows, self.columns = strips, tuple(rows), tuple(columns)

    def call(self, x):
        if self.strips == 1:
            return ops.pad(x, [[0, 0], self.rows, self.columns, [0, 0]])
        above, below = self.rows
        parts = [
            *([row_beside(x, self.strips, above=True)] if above else []),
            x,
            *([row_beside(x, self.strips, above=False)] if below else []),
        ]
        x = ops.concatenate(parts, axis=1)
        return ops.pad(x, [[0, 0], [0, 0], self.columns, [0, 0]])

    def compute_output_shape(self, shape):
        batch, height, width, channels = shape
        return (batch, height + sum(self.rows), width + sum(self.columns), channels)

    def get_config(self):
        own = {"strips": self.strips, "rows": self.rows, "columns": self.columns}
        return super().get_config() | own
