"""3x3 convolutions of stride 2 whose gradient a TPU computes at full speed.

The derived gradient is a convolution of a map with zeros between its places, most of the work for
nothing: ten times as slow at SpineNet-190's widths. Here each place gives the gradients of the two
by two places that it halves, side by side in the channels. Weights and results are the same.
"""

import keras
from keras import ops


@keras.saving.register_keras_serializable("spinenet_tf")
class HalvingConv(keras.layers.Conv2D):
    """A 3x3 convolution of stride 2 without bias of [b, h, w, c], h and w known.

    Args:
      symmetric: with padding 'same', a map is padded by 1 on all sides; else as SAME does it.
    """

    def __init__(self, filters: int, kernel_size, symmetric: bool, **kwargs):
        super().__init__(filters, kernel_size, **kwargs)
        self.symmetric = symmetric

    def call(self, x):
        before = tuple(int(self.symmetric or side % 2) for side in x.shape[1:3])
        kernel = ops.convert_to_tensor(self.kernel)
        return halve(x, kernel, before if self.padding == "same" else None)

    def get_config(self):
        return super().get_config() | {"symmetric": self.symmetric}


def halve(x, kernel, before: tuple[int, int] | None):
    """Halves a map, or one in pairs of columns, by a convolution.

    Args:
      x: [b, h, w, c], h and w known.
      kernel: [3, 3, c, d]; or [3, 2, c, d], of pairs of columns (see `models.pairs`).
      before: whether to put zeros (1) or none (0) above the map, and left of it, and then as many
        below it and right of it as are needed; None: x is padded already.

    Returns:
      [b, ceil(h / 2), ceil(w / 2), d]; of pairs [b, ceil(h / 2), w, d].
    """
    steps = (2, 2 if kernel.shape[1] == 3 else 1)
    padding = _needed(x, kernel, steps, before) if before else [(0, 0), (0, 0)]
    if keras.backend.backend() == "tensorflow":
        return _tensorflow_halve(x, kernel, steps, padding)
    return ops.conv(ops.pad(x, [(0, 0), *padding, (0, 0)]), kernel, steps, "valid")


def _needed(x, kernel, steps: tuple, before: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows of zeros above and below x, and columns left and right of it."""
    padding = []
    for side, taps, step, zeros in zip(x.shape[1:3], kernel.shape, steps, before, strict=False):
        all_zeros = (-(-side // step) - 1) * step + taps - side
        padding.append((zeros, all_zeros - zeros))
    return padding


def _tensorflow_halve(x, kernel, steps: tuple[int, int], padding: list[tuple[int, int]]):
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    strides, (_, height, width, channels) = [1, *steps, 1], x.shape
    before = [zeros for zeros, _ in padding]

    @tf.custom_gradient
    def convolve(x, kernel):
        padded = tf.pad(x, [(0, 0), *padding, (0, 0)])

        def gradient(upstream):
            around = _around(x, upstream, steps, before)
            spread = _spread_kernel(kernel, steps[1], before)
            cells = tf.nn.conv2d(tf.pad(upstream, around), spread, 1, "VALID")
            rows, columns = cells.shape[1:3]
            cells = tf.reshape(cells, [-1, rows, columns, 2, steps[1], channels])
            cells = tf.transpose(cells, [0, 1, 3, 2, 4, 5])
            cells = tf.reshape(cells, [-1, 2 * rows, steps[1] * columns, channels])
            return cells[:, :height, :width], tf.raw_ops.Conv2DBackpropFilter(
                input=padded, filter_sizes=kernel.shape, out_backprop=upstream, strides=strides,
                padding="VALID",
            )  # fmt: skip

        return tf.nn.conv2d(padded, kernel, strides, "VALID"), gradient

    return convolve(x, tf.convert_to_tensor(kernel))


def _around(x, upstream, steps: tuple[int, int], before: list[int]) -> list[tuple[int, int]]:
    """Zeros around a gradient, so that 2x2 places of it reach every place of x."""
    padding = []
    for old, new, step, zeros in zip(x.shape[1:3], upstream.shape[1:3], steps, before, strict=True):
        padding.append((1 - zeros, -(-old // step) - new + zeros))
    return [(0, 0), *padding, (0, 0)]


def _spread_kernel(kernel, step: int, before: list[int]):
    """The kernel that passes a gradient back: [3, 3, c, d] -> [2, 2, d, 4 c], of each 2x2 places.

    With pairs of columns [3, 2, c, d] -> [2, 2, d, 2 c]. Place 2 i + p of the input meets tap
    p + before - 2 k of place i + k of the output.
    """
    zeros = [[n, 1 - n] for n in before] if step == 2 else [[before[0], 1 - before[0]], [0, 0]]
    kernel = ops.pad(kernel, [*zeros, [0, 0], [0, 0]])
    channels, filters = kernel.shape[2:]
    kernel = ops.reshape(kernel, [2, 2, 2, step, channels, filters])[::-1, :, ::-1]
    kernel = ops.transpose(kernel, [0, 2, 5, 1, 3, 4])
    return ops.reshape(kernel, [2, 2, filters, 2 * step * channels])
