"""The first layers of SpineNet and ResNet: 7x7 convolution, batch norm, activation, max-pool."""

import keras
from keras import ops

from spinenet_tf.models.pointwise import Held, affine, over_replicas, wide

POOL = dict(padding="same", data_format="channels_last")


@keras.saving.register_keras_serializable("spinenet_tf")
class Stem(Held):
    """A 7x7 convolution of stride 2, batch norm, an activation and a 3x3 max-pool of stride 2.

    Of a TPU's 128 lanes, 3 channels fill three and 64 half of them, at twice the cost in time and
    memory. So where the width of the map is even, two columns of 64 channels lie side by side, and
    the convolution sees cells of 2 x 4 pixels. Weights and result are those of plain layers.

    Args:
      symmetric: the image is padded by 3 on all sides; else as SAME does it.

    Call arguments: images [b, h, w, 3]; returns [b, ceil(h / 4), ceil(w / 4), filters].
    """

    def __init__(self, convs: list, norms: list, activation: str, symmetric: bool, **kwargs):
        super().__init__(convs, norms, **kwargs)
        self.activation, self.symmetric = activation, symmetric

    def build(self, shape):
        self.build_held([shape])

    def compute_output_shape(self, shape):
        return (shape[0], *(n and -(-n // 4) for n in shape[1:3]), self.convs[0].filters)

    def call(self, image, training=False):
        image = ops.cast(image, self.compute_dtype)
        kernel = ops.cast(ops.convert_to_tensor(self.convs[0].kernel), image.dtype)
        sides, norm = ops.shape(image)[1:3], self.norms[0]
        pairs = all(isinstance(n, int) and (n + 1) // 2 % 2 == 0 for n in sides)
        y, times = (self._pair_conv(image, kernel), 2) if pairs else (self._conv(image, kernel), 1)
        y = ops.cast(y, wide(image))
        statistics = _statistics(y, times, norm) if training and self.trainable else None
        scale, offset = (ops.tile(part, times) for part in affine(norm, statistics))
        y = keras.activations.get(self.activation)(ops.cast(y * scale + offset, image.dtype))
        return _pair_pool(y) if pairs else ops.max_pool(y, 3, 2, **POOL)

    def _conv(self, image, kernel):
        if not self.symmetric:
            return ops.conv(image, kernel, 2, "same")
        return ops.conv(ops.pad(image, [[0, 0], [3, 3], [3, 3], [0, 0]]), kernel, 2, "valid")

    def _pair_conv(self, image, kernel):
        """[b, 2 h, 4 w, c] * [7, 7, c, d] -> [b, h, w, 2 d]: two columns side by side."""
        channels, filters = kernel.shape[2:]
        kernels = [  # of a column in 2 rows and 4 columns of pixels, from the first or the third
            ops.pad(kernel, [[0, 1], [first, 5 - first], [0, 0], [0, 0]]) for first in (0, 2)
        ]
        kernel = ops.reshape(ops.concatenate(kernels, -1), [4, 2, 3, 4, channels, 2 * filters])
        kernel = ops.transpose(kernel, [0, 2, 1, 3, 4, 5])
        kernel = ops.reshape(kernel, [4, 3, 8 * channels, 2 * filters])
        height, width = (-(-n // 4) * 4 for n in image.shape[1:3])
        before = [3 if self.symmetric else 2 + n % 2 for n in image.shape[1:3]]
        full = [height + 6, width + 8]
        after = [f - b - n for f, b, n in zip(full, before, image.shape[1:3], strict=True)]
        image = ops.pad(image, [[0, 0], *zip(before, after, strict=True), [0, 0]])
        cells = [image[:, y::2, x::4] for y in range(2) for x in range(4)]  # a TPU transposes badly
        return ops.conv(ops.concatenate(cells, -1), kernel, padding="valid")

    def get_config(self):
        return super().get_config() | {
            "activation": self.activation,
            "symmetric": self.symmetric,
        }


def _pair_pool(y):
    """SAME max-pooling, 3x3 of stride 2, of an even number of columns in pairs, and rows."""
    return _pair_max(ops.max_pool(y, (3, 1), (2, 1), **POOL))


@ops.custom_gradient
def _pair_max(pairs):
    """[b, h, w, 2 c] pairs of columns -> [b, h, w, c], the largest of a pair and the column after.

    The gradient is written out: the derived one moves twice as many maps.
    """

    def parts():
        first, second = ops.split(pairs, 2, axis=-1)
        last = ops.full_like(first[:, :, :1], -float("inf"))
        return first, second, ops.concatenate([first[:, :, 1:], last], axis=2)

    def gradient(*args, upstream=None):
        upstream = args[-1] if upstream is None else upstream
        first, second, third = parts()
        is_first = ops.logical_and(first >= second, first >= third)
        is_third = ops.logical_and(third > first, third > second)
        zero = ops.zeros_like(upstream)
        after = ops.pad(ops.where(is_third, upstream, zero), [[0, 0], [0, 0], [1, 0], [0, 0]])
        to_first = ops.where(is_first, upstream, zero) + after[:, :, :-1]
        to_second = ops.where(ops.logical_or(is_first, is_third), zero, upstream)
        return ops.concatenate([to_first, to_second], axis=-1)

    first, second, third = parts()
    return ops.maximum(ops.maximum(first, second), third), gradient


def _statistics(y, times: int, norm):
    """Mean and variance [d] of [b, h, w, times * d] over all places and replicas."""
    sums = ops.stack([ops.sum(y, (0, 1, 2)), ops.sum(y * y, (0, 1, 2))])
    sums = ops.sum(ops.reshape(sums, [2, times, -1]), axis=1)
    count = ops.cast(ops.prod(ops.shape(y)[:-1]) * times, sums.dtype)
    if norm.synchronized:
        sums, count = over_replicas(sums), over_replicas(count)
    mean, square = sums[0] / count, sums[1] / count
    return mean, ops.maximum(square - mean * mean, 0.0)
