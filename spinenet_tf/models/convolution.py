"""Convolutions, in the form in which the TPU's compiler does best with a small batch."""

import contextlib
import contextvars

import keras
from keras import ops

SUBLANES = 8  # rows of a TPU's register
WIDE = 128  # on narrower maps, the copies to and from that form cost more than it saves
_FOR_TPU = contextvars.ContextVar("for_tpu", default=False)


@contextlib.contextmanager
def for_tpu():
    """What is traced within is compiled for a TPU, whatever machine this is."""
    token = _FOR_TPU.set(True)
    try:
        yield
    finally:
        _FOR_TPU.reset(token)


def conv(x, kernel, strides=(1, 1), padding: str = "valid"):
    """[b, h, w, c] features and [k, k, c, filters] kernel -> [b, h, w, filters].

    On a TPU the images of a batch lie in a register's 8 rows, where fewer images leave some empty.
    As layers of one volume they do not: the compiler puts columns there instead.
    """
    if max(strides) > 1 or not _as_volume(x):
        return ops.conv(x, kernel, strides, padding)
    return ops.conv(x[None], kernel[None], 1, padding)[0]


def filter_gradient(x, y):
    """[1, 1, c, d], the sums of x_i y_j over all places of [b, h, w, c] and [b, h, w, d] maps."""
    import tensorflow as tf

    kernel = [1, 1, x.shape[-1], y.shape[-1]]
    if not _as_volume(x):
        return tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=kernel, out_backprop=y, strides=[1] * 4, padding="VALID"
        )
    return tf.raw_ops.Conv3DBackpropFilterV2(
        input=x[None], filter_sizes=[1, *kernel], out_backprop=y[None], strides=[1] * 5,
        padding="VALID",
    )[0]  # fmt: skip


def _as_volume(x) -> bool:
    batch, _, width, _ = x.shape
    return 1 < (batch or 0) < SUBLANES and (width or 0) >= WIDE and on_tpu()


def on_tpu() -> bool:
    """Whether what is built or traced now is for a TPU."""
    if _FOR_TPU.get() or keras.backend.backend() != "tensorflow":
        return _FOR_TPU.get()
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


@keras.saving.register_keras_serializable("spinenet_tf")
class Conv(keras.layers.Conv2D):
    """Keras' layer, by `conv`; it dilates nothing."""

    def convolution_op(self, inputs, kernel):
        return conv(inputs, kernel, self.strides, self.padding)
