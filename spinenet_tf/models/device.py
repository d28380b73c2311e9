"""Which kind of machine a model is built for: some layers are computed otherwise on a TPU."""

import contextlib
import contextvars

import keras

_FOR_TPU = contextvars.ContextVar("for_tpu", default=False)


@contextlib.contextmanager
def for_tpu():
    """Models built within are for a TPU, whatever machine this is."""
    token = _FOR_TPU.set(True)
    try:
        yield
    finally:
        _FOR_TPU.reset(token)


def on_tpu() -> bool:
    """Whether a model built now is for a TPU."""
    if _FOR_TPU.get() or keras.backend.backend() != "tensorflow":
        return _FOR_TPU.get()
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)
