"""Maps in pairs of columns: [b, h, w / 2, 2 c] instead of [b, h, w, c], c channels of each column.

A TPU's register has 128 lanes for channels, so a map of 64 takes the time and the memory of one of
128. Two columns side by side fill the lanes. Their kernels have zeros where columns do not meet,
which is free there, as a kernel of 64 channels would be padded with zeros anyway; elsewhere it is
not, so that other devices do not have pairs. The weights are the same.
"""

import keras
from keras import ops

from spinenet_tf.models.device import on_tpu
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
      symmetric: with a stride of 2, a map is padded by 1 on all sides; else as SAME does it.
    """

    def __init__(self, convs: list, norms: list, strides: int, symmetric: bool, **kwargs):
        super().__init__(convs, norms, **kwargs)
        self.strides, self.symmetric = strides, symmetric

    def build(self, shape):
        self.build_held([(*shape[:-1], shape[-1] // 2)])

    def compute_output_shape(self, shape):
        height = shape[1] and shape[1] // self.strides
        return (shape[0], height, shape[2], self.convs[0].filters * (2 // self.strides))

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
            return ops.conv(x, kernel, padding="same")
        before = int(self.symmetric)
        strided = _strided if keras.backend.backend() != "tensorflow" else _tensorflow_strided
        return strided(x, _taps(kernel, before, 1 - before), before)

    def get_config(self):
        return super().get_config() | {"strides": self.strides, "symmetric": self.symmetric}


def _taps(kernel, before: int, after: int):
    """[3, 3, c, d] with columns of zeros before and after -> [3, n, 2 c, d], of n pairs."""
    kernel = ops.pad(kernel, [[0, 0], [before, after], [0, 0], [0, 0]])
    rows, columns, channels, filters = kernel.shape
    return ops.reshape(kernel, [rows, columns // 2, 2 * channels, filters])


def _strided(x, kernel, before: int):
    """Every second row of a convolution that is padded by 1, `before` the map or after it."""
    x = ops.pad(x, [[0, 0], [before, 1 - before], [before, 1 - before], [0, 0]])
    return ops.conv(x, kernel, (2, 1), "valid")


def _tensorflow_strided(x, kernel, before: int):
    """The same with a written gradient: even and odd rows side by side fill a TPU's lanes.

    The derived one, a convolution of rows with zeros between them, takes twice as long.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def strided(x, kernel):
        def gradient(upstream):
            padding = [[0, 0], [1 - before, before], [1 - before, before], [0, 0]]
            both = tf.nn.conv2d(
                tf.pad(upstream, padding), _of_both_rows(kernel, before), 1, "VALID"
            )
            rows, columns, channels = both.shape[1:]
            both = tf.reshape(both, [-1, rows, columns, 2, channels // 2])
            back = tf.reshape(tf.transpose(both, [0, 1, 3, 2, 4]), [-1, *x.shape[1:]])
            padding = [[0, 0], [before, 1 - before], [before, 1 - before], [0, 0]]
            return back, tf.raw_ops.Conv2DBackpropFilter(
                input=tf.pad(x, padding), filter_sizes=kernel.shape, out_backprop=upstream,
                strides=[1, 2, 1, 1], padding="VALID",
            )  # fmt: skip

        return _strided(x, kernel, before), gradient

    return strided(x, kernel)


def _of_both_rows(kernel, before: int):
    """The kernel by which `_strided` passes a gradient back: [3, 2, c, d] -> [2, 2, d, 2 c].

    Row 2 i + p of its input meets tap p + before - 2 k of output row i + k.
    """
    kernel = ops.pad(kernel, [[before, 1 - before], [0, 0], [0, 0], [0, 0]])
    _, columns, channels, filters = kernel.shape
    kernel = ops.reshape(kernel, [2, 2, columns, channels, filters])[::-1, :, ::-1]
    kernel = ops.transpose(kernel, [0, 2, 4, 1, 3])
    return ops.reshape(kernel, [2, columns, filters, 2 * channels])
