"""The first layers of SpineNet and ResNet: 7x7 convolution, batch norm, activation, max-pool."""

import keras
from keras import ops

from spinenet_tf.models.norm import normalized
from spinenet_tf.models.pointwise import Held
from spinenet_tf.models.strips import row_beside

COLUMNS = 4  # side by side; the outer ones of every two first, for the pool
ORDER = (0, 2, 1, 3)
POOL = dict(padding="same", data_format="channels_last")


@keras.saving.register_keras_serializable("spinenet_tf")
class Stem(Held):
    """A 7x7 convolution of stride 2, batch norm, an activation and a 3x3 max-pool of stride 2.

    Of a TPU's 128 lanes, 3 channels fill three and 64 half of them, at the cost in time and memory
    of 128. So with `pairs`, four columns of the convolution lie side by side, and it sees cells of
    2 x 8 pixels. Weights and result are those of plain layers.

    Call arguments: images [b, h, w, 3]; returns [b, ceil(h / 4), ceil(w / 4), filters], or with
    `pairs` [b * strips, h / 4 / strips, w / 8, 2 * filters], see `models.layout`.

    Args:
      symmetric: the image is padded by 3 on all sides; else as SAME does it.
      strips: 1 without `pairs`.
    """

    def __init__(
        self, convs: list, norms: list, activation: str, symmetric: bool, pairs: bool,
        strips: int = 1, **kwargs,
    ):  # fmt: skip
        super().__init__(convs, norms, **kwargs)
        self.activation, self.symmetric = activation, symmetric
        self.pairs, self.strips = pairs, strips

    def build(self, shape):
        self.build_held([shape])

    def compute_output_shape(self, shape):
        height, width = (n and -(-n // 4) for n in shape[1:3])
        filters = self.convs[0].filters
        if self.pairs:
            batch = shape[0] and shape[0] * self.strips
            return (batch, height // self.strips, width // 2, 2 * filters)
        return (shape[0], height, width, filters)

    def call(self, image, training=False):
        image, training = ops.cast(image, self.compute_dtype), training and self.trainable
        kernel = ops.cast(ops.convert_to_tensor(self.convs[0].kernel), image.dtype)
        y = (self._packed_conv if self.pairs else self._conv)(image, kernel)
        y = normalized(y, self.norms, COLUMNS if self.pairs else 1, training)
        y = keras.activations.get(self.activation)(y)
        if not self.pairs:
            return ops.max_pool(y, 3, 2, **POOL)
        return _pool_columns(self._pool_rows(y))

    def _conv(self, image, kernel):
        if not self.symmetric:
            return ops.conv(image, kernel, 2, "same")
        return ops.conv(ops.pad(image, [[0, 0], [3, 3], [3, 3], [0, 0]]), kernel, 2, "valid")

    def _packed_conv(self, image, kernel):
        """[b, 2 h, 8 w, c] * [7, 7, c, d] -> [b, h, w, 4 d]."""
        channels, filters = kernel.shape[2:]
        kernels = [ops.pad(kernel, [[0, 1], [2 * i, 9 - 2 * i], [0, 0], [0, 0]]) for i in ORDER]
        kernel = ops.reshape(ops.concatenate(kernels, -1), [4, 2, 2, 8, channels, 4 * filters])
        kernel = ops.transpose(kernel, [0, 2, 1, 3, 4, 5])
        kernel = ops.reshape(kernel, [4, 2, 16 * channels, 4 * filters])
        before = 3 if self.symmetric else 2
        image = ops.pad(image, [[0, 0], [before, 6 - before], [before, 8 - before], [0, 0]])
        cells = [image[:, y::2, x::8] for y in range(2) for x in range(8)]  # a TPU transposes badly
        return ops.conv(self._cut(ops.concatenate(cells, -1)), kernel, padding="valid")

    def _cut(self, cells):
        """[b, h + 3, w, c] -> [b * strips, h / strips + 3, w, c]: strips that overlap."""
        height = (cells.shape[1] - 3) // self.strips
        strips = [cells[:, i * height : (i + 1) * height + 3] for i in range(self.strips)]
        return ops.reshape(ops.stack(strips, axis=1), [-1, height + 3, *cells.shape[2:]])

    def _pool_rows(self, y):
        if self.strips == 1:
            return ops.max_pool(y, (3, 1), (2, 1), **POOL)
        below = row_beside(y, self.strips, above=False, fill=-float("inf"))
        y = ops.concatenate([y, below], axis=1)
        return ops.max_pool(y, (3, 1), (2, 1), padding="valid", data_format="channels_last")

    def get_config(self):
        own = {"activation": self.activation, "symmetric": self.symmetric, "pairs": self.pairs}
        return super().get_config() | own | {"strips": self.strips}


@ops.custom_gradient
def _pool_columns(y):
    """Columns 4 j + `ORDER` side by side -> pairs: the largest of 0 to 2, and of 2 to the next 0.

    [b, h, w, 4 c] -> [b, h, w, 2 c]. The gradient is written out: the derived one moves twice as
    many maps.
    """

    def parts():
        outer, inner = ops.split(y, 2, axis=-1)  # columns 0 and 2, columns 1 and 3
        first, third = ops.split(outer, 2, axis=-1)
        end = ops.full_like(first[:, :, :1], -float("inf"))
        following = ops.concatenate([first[:, :, 1:], end], axis=2)
        return outer, inner, ops.concatenate([third, following], axis=-1)

    def gradient(*args, upstream=None):
        upstream = args[-1] if upstream is None else upstream
        outer, inner, after = parts()
        is_after = ops.logical_and(after > outer, after > inner)
        is_inner = ops.logical_and(inner > outer, inner >= after)
        zero = ops.zeros_like(upstream)
        third, following = ops.split(ops.where(is_after, upstream, zero), 2, axis=-1)
        first = ops.pad(following, [[0, 0], [0, 0], [1, 0], [0, 0]])[:, :, :-1]
        to_inner = ops.where(is_inner, upstream, zero)
        to_outer = ops.where(ops.logical_or(is_after, is_inner), zero, upstream)
        to_outer = to_outer + ops.concatenate([first, third], axis=-1)
        return ops.concatenate([to_outer, to_inner], axis=-1)

    outer, inner, after = parts()
    return ops.maximum(ops.maximum(outer, inner), after), gradient
