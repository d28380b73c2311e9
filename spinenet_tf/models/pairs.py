"""Maps in pairs of columns: [b, h, w / 2, 2 c] instead of [b, h, w, c], c channels of each column.

A TPU's register has 128 lanes for channels, so a map of 64 takes the time and the memory of one of
128. Two columns side by side fill the lanes. Their kernels have zeros where columns do not meet,
which is free there, as a kernel of 64 channels would be padded with zeros anyway; elsewhere it is
not, so that other devices do not have pairs. The weights are the same.
"""

import keras
from keras import ops

from spinenet_tf.models.device import on_tpu
from spinenet_tf.models.halving import halve
from spinenet_tf.models.norm import normalized
from spinenet_tf.models.pointwise import Held, block_diagonal


def pairs_fit(shape: tuple) -> bool:
    """Whether L2 of an image [b, h, w, c] is in pairs of columns: on a TPU, of a known size."""
    height, width = shape[1:3]
    return bool(height and width and height % 8 == width % 8 == 0 and on_tpu())


def unpair(x):
    """[b, h, w / 2, 2 c] -> [b, h, w, c]."""
    _, height, width, channels = x.shape
    return keras.layers.Reshape((height, 2 * width, channels // 2))(x)


def pair(x):
    """[b, h, w, c] -> [b, h, w / 2, 2 c]."""
    _, height, width, channels = x.shape
    return keras.layers.Reshape((height, width // 2, 2 * channels))(x)


@keras.saving.register_keras_serializable("spinenet_tf")
class PairConv(Held):
    """A convolution of pairs of columns, 1x1 or 3x3, and batch norm.

    Call arguments: [b, h, w / 2, 2 c], h even; returns [b, h, w / 2, 2 filters], or with a stride
    of 2 a plain map [b, h / 2, w / 2, filters].

    Args:
      padding: 'same', or 'valid' if the map is padded already (`strips.Halo`).
      symmetric: with a stride of 2, padding is by 1 on all sides; else as SAME does it.
    """

    def __init__(
        self, convs: list, norms: list, strides: int, padding: str, symmetric: bool, **kwargs
    ):
        super().__init__(convs, norms, **kwargs)
        self.strides, self.padding, self.symmetric = strides, padding, symmetric

    def build(self, shape):
        self.build_held([(*shape[:-1], shape[-1] // 2)])

    def compute_output_shape(self, shape):
        filters = self.convs[0].filters * (2 // self.strides)
        lost = 2 // self.strides if self.padding == "valid" else 0
        height, width = (n and n - lost for n in shape[1:3])
        return (shape[0], height and height // self.strides, width, filters)

    def call(self, x, training=False):
        x = ops.cast(x, self.compute_dtype)
        kernel = ops.cast(ops.convert_to_tensor(self.convs[0].kernel), x.dtype)
        y, training = self._conv(x, kernel), training and self.trainable
        return normalized(y, self.norms, 2 // self.strides, training)

    def _conv(self, x, kernel):
        if kernel.shape[0] == 1:
            return ops.conv(x, block_diagonal(kernel[0, 0])[None, None], padding="valid")
        if self.strides == 1:
            columns = [_taps(kernel, 1 + column, 2 - column) for column in range(2)]
            kernel = ops.concatenate(columns, axis=-1)
            return ops.conv(x, kernel, padding=self.padding)
        before = int(self.symmetric)
        kernel = _taps(kernel, before, 1 - before)
        return halve(x, kernel, (before, before) if self.padding == "same" else None)

    def get_config(self):
        own = {"strides": self.strides, "padding": self.padding, "symmetric": self.symmetric}
        return super().get_config() | own


def _taps(kernel, before: int, after: int):
    """[3, 3, c, d] with columns of zeros before and after -> [3, n, 2 c, d], of n pairs."""
    kernel = ops.pad(kernel, [[0, 0], [before, after], [0, 0], [0, 0]])
    rows, columns, channels, filters = kernel.shape
    return ops.reshape(kernel, [rows, columns // 2, 2 * channels, filters])
