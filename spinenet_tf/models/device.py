"""Which kind of machine a model is built for: some layers are computed otherwise on a TPU."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras

_FOR_TPU = contextvars.ContextVar("for_tpu", default=False)
_VARYING = contextvars.ContextVar("varying", default=False)
_IMAGES = contextvars.ContextVar("images", default=0)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def for_tpu(images: int = 0) -> Iterator[None]:
    """Models built within are for a TPU, whatever machine this is; see `images_a_device`."""
    with _set(_FOR_TPU, True), images_a_device(images):
        yield


def images_a_device(images: int) -> contextlib.AbstractContextManager:
    """Models built within will mostly see so many images at once on a device; 0: not known."""
    return _set(_IMAGES, images)


def varying_shapes(allowed: bool) -> contextlib.AbstractContextManager:
    """What is computed within may have shapes that depend on the data, which XLA cannot compile."""
    return _set(_VARYING, allowed)


def on_tpu() -> bool:
    """Whether a model built now is for a TPU."""
    if _FOR_TPU.get() or keras.backend.backend() != "tensorflow":
        return _FOR_TPU.get()
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


def images_at_once() -> int:
    """How many images a model built now will see at once on a TPU; 0: no TPU, or not known."""
    return _IMAGES.get() if on_tpu() else 0


def shapes_may_vary() -> bool:
    """Whether shapes may depend on the data here."""
    return _VARYING.get()
