"""Which kind of machine a model is built for: some layers are computed otherwise on a TPU."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras

_FOR_TPU = contextvars.ContextVar("for_tpu", default=False)
_VARYING = contextvars.ContextVar("varying", default=False)
_IMAGES = contextvars.ContextVar("images", default=0)


@contextlib.contextmanager
def for_tpu(images: int = 0) -> Iterator[None]:
    """Models built within are for a TPU, whatever machine this is; see `images_a_device`."""
    token = _FOR_TPU.set(True)
    try:
        with images_a_device(images):
            yield
    finally:
        _FOR_TPU.reset(token)


@contextlib.contextmanager
def images_a_device(images: int) -> Iterator[None]:
    """Models built within will mostly see so many images at once on a device; 0: not known."""
    token = _IMAGES.set(images)
    try:
        yield
    finally:
        _IMAGES.reset(token)


def on_tpu() -> bool:
    """Whether a model built now is for a TPU."""
    if _FOR_TPU.get() or keras.backend.backend() != "tensorflow":
        return _FOR_TPU.get()
    import tensorflow as tf  # not at the top: the same model runs without TensorFlow

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


def images_at_once() -> int:
    """How many images a model built now will see at once on a TPU; 0: no TPU, or not known."""
    return _IMAGES.get() if on_tpu() else 0


@contextlib.contextmanager
def varying_shapes(allowed: bool) -> Iterator[None]:
    """What is computed within may have shapes that depend on the data, which XLA cannot compile."""
    token = _VARYING.set(allowed)
    try:
        yield
    finally:
        _VARYING.reset(token)


def shapes_may_vary() -> bool:
    """Whether shapes may depend on the data here."""
    return _VARYING.get()
