"""Keras layers that Keras does not have, or computes otherwise."""

import contextlib
import contextvars
import math

import keras
from keras import ops

from spinenet_tf.models.device import on_tpu

PHILOX = 1  # TensorFlow's number of the random generator


@keras.saving.register_keras_serializable("spinenet_tf")
class ImageConv(keras.layers.Conv2D):
    """A convolution of stride 2 with an odd kernel, padding 'valid', on images.

    Computed on cells of 2x2 pixels, as a convolution of stride 1 with a kernel half as wide: of a
    TPU's 128 lanes, three channels would use three. Weights and result are those of the plain one.
    """

    def call(self, image):
        taps = (self.kernel_size[0] + 1) // 2
        kernel = ops.pad(self.kernel, [[0, 1]] * 2 + [[0, 0]] * 2)
        channels, filters = kernel.shape[2:]
        kernel = ops.reshape(kernel, [taps, 2, taps, 2, channels, filters])
        kernel = ops.transpose(kernel, [0, 2, 1, 3, 4, 5])
        kernel = ops.reshape(kernel, [taps, taps, 4 * channels, filters])
        return ops.conv(_cells(image), kernel, padding="valid")


def _cells(image):
    """[b, h, w, c] -> [b, ceil(h / 2), ceil(w / 2), 4 c]. Slices: a TPU transposes badly."""
    height, width = ops.shape(image)[1:3]
    if not all(isinstance(n, int) and n % 2 == 0 for n in (height, width)):
        image = ops.pad(image, [[0, 0], [0, 1], [0, 1], [0, 0]])
    bottom, right = height + height % 2, width + width % 2
    return ops.concatenate(
        [image[:, y:bottom:2, x:right:2] for y in range(2) for x in range(2)], axis=-1
    )


@keras.saving.register_keras_serializable("spinenet_tf")
class Swish(keras.layers.Layer):
    """x * sigmoid(x), whose gradient is made of the result and the sigmoid.

    Keras' own keeps x instead and computes the sigmoid again: fewer bytes where a compiler fuses
    that with what follows, as XLA does, but another pass over the map where none does. The result
    is kept anyway, since a convolution learns from it.
    """

    def call(self, x):
        return _swish(x)

    def compute_output_shape(self, input_shape):
        return input_shape


@ops.custom_gradient
def _swish(x):
    gate = ops.sigmoid(x)
    y = x * gate

    def gradient(*args, upstream=None):
        upstream = args[-1] if upstream is None else upstream
        return upstream * (gate * (1.0 - y) + y)

    return y, gradient


@keras.saving.register_keras_serializable("spinenet_tf")
class WeightDecay(keras.regularizers.L2):
    """Keras' L2 by TensorFlow's `l2_loss`, whose gradient is one product."""

    def __call__(self, x):
        if keras.backend.backend() != "tensorflow":
            return super().__call__(x)
        import tensorflow as tf  # not at the top: the same model runs without TensorFlow

        return 2.0 * self.l2 * tf.nn.l2_loss(ops.convert_to_tensor(x))


@keras.saving.register_keras_serializable("spinenet_tf")
class MapDense(keras.layers.Dense):
    """A dense layer on flattened maps [b, h, w, c] of a static size.

    Weights and result are those of `Flatten` and `Dense`. A TPU moves a map to flatten it, so there
    it is a convolution with a kernel as large as the map, whose gradient a CPU takes long for.
    """

    def __init__(self, units: int, **settings):
        super().__init__(units, **settings)
        self.flattens = not on_tpu()

    def build(self, input_shape):
        super().build((None, math.prod(input_shape[1:])))
        self.input_spec = keras.layers.InputSpec(shape=(None, *input_shape[1:]))

    def call(self, x):
        if self.flattens:
            return super().call(ops.reshape(x, [-1, self.kernel.shape[0]]))
        kernel = ops.reshape(self.kernel, [*x.shape[1:], self.units])
        x = ops.reshape(ops.conv(x, kernel, padding="valid"), [-1, self.units])
        return self.activation(x + self.bias if self.use_bias else x)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.units)


_PROGRESS = contextvars.ContextVar("progress", default=1.0)


@contextlib.contextmanager
def training_progress(fraction):
    """Tells layers called within how far training is, 0 to 1 (a number or a scalar tensor)."""
    token = _PROGRESS.set(fraction)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


class ReplicaSeeds(keras.random.SeedGenerator):
    """Seeds that differ between the replicas of a strategy; Keras' own are equal."""

    def next(self, ordered: bool = True):
        """The next seed, [2]."""
        seed = super().next(ordered)
        if keras.backend.backend() != "tensorflow":
            return seed
        import tensorflow as tf  # not at the top: the same model runs without TensorFlow

        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context else 0
        return seed + ops.cast(ops.stack([replica * 1_000_003, 0]), seed.dtype)

    def uniform(self, shape):
        """float32 numbers from 0 to 1 (without) of `shape`, others at every call.

        Not TensorFlow's `stateless_uniform`: it scrambles the seed, which makes 300 XLA operations
        of a draw instead of 35; they were a fifth of those of SpineNet-190's training step. Philox,
        the generator, needs no scrambling: calls have other high words of its counter, layers other
        keys.
        """
        if keras.backend.backend() != "tensorflow":
            return keras.random.uniform(shape, seed=self)
        import tensorflow as tf  # not at the top: the same model runs without TensorFlow

        key, call = tf.unstack(tf.cast(self.next(), tf.uint64))
        counter = tf.stack([tf.zeros([], tf.uint64), call])  # the low word counts the numbers
        return tf.raw_ops.StatelessRandomUniformV2(
            shape=shape, key=key[None], counter=counter, alg=PHILOX
        )


@keras.saving.register_keras_serializable("spinenet_tf")
class StochasticDepth(keras.layers.Layer):
    """Drops a whole residual branch of an image, and scales the kept ones by 1 / (1 - rate).

    Args:
      strips: that an image is cut into, see `models.strips`.
    """

    def __init__(self, rate: float, strips: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.strips = rate, strips
        self.seed_generator = ReplicaSeeds(name=f"{self.name}_seeds")

    def call(self, x, training=False):
        if not training:
            return x
        images = ops.shape(x)[0] // self.strips
        luck = self.seed_generator.uniform((images, 1, 1, 1))
        luck = ops.repeat(luck, self.strips, axis=0)
        return x * ops.cast(luck >= self.rate, x.dtype) / (1.0 - self.rate)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "strips": self.strips}


@keras.saving.register_keras_serializable("spinenet_tf")
class DropBlock(keras.layers.Layer):
    """Zeroes squares of feature maps and scales the rest up (arXiv 1810.12890, algorithm 1).

    The share that is dropped rises linearly over training (section 3 there), from 0 to `rate`; see
    `training_progress`. On a map smaller than the square, the square is the map.
    """

    def __init__(self, rate: float, size: int, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.size = rate, size
        self.seed_generator = ReplicaSeeds(name=f"{self.name}_seeds")

    def call(self, x, training=False):
        if not training:
            return x
        if not all(isinstance(side, int) for side in ops.shape(x)[1:]):
            raise ValueError(f"{self.name}: DropBlock trains on maps of a static size only")
        keep = ops.cast(self._keep(ops.shape(x)), x.dtype)
        kept = ops.mean(ops.cast(keep, "float32"))
        return x * keep / ops.cast(ops.maximum(kept, 1e-6), x.dtype)

    def _keep(self, shape):
        """[b, h, w, c], 1 where no square lies. Squares do not stick out of the map."""
        sides = [min(self.size, side) for side in shape[1:3]]
        room = [side - square + 1 for side, square in zip(shape[1:3], sides, strict=True)]
        rate = self.rate * ops.cast(_PROGRESS.get(), "float32")
        gamma = rate * shape[1] * shape[2] / (sides[0] * sides[1] * room[0] * room[1])
        luck = self.seed_generator.uniform((shape[0], *room, shape[3]))
        corner = ops.cast(luck < gamma, "float32")  # top left corners of squares
        padding = [[0, 0], *([side - 1, side - 1] for side in sides), [0, 0]]
        dropped = ops.max_pool(ops.pad(corner, padding), sides, strides=1, padding="valid")
        return 1.0 - dropped

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "size": self.size}


@keras.saving.register_keras_serializable("spinenet_tf")
class Upsample(keras.layers.Layer):
    """Nearest-neighbour resize of features to `level` of an image's pyramid.

    A layer, not a function, since only at run time is the size of a dynamic image known. Row i
    reads row floor(i * source / target), so a size that does not divide (224 px: P7 has 2 rows, P5
    has 7) gives what the official code's resize gives.

    Call arguments: [features [b, h, w, c], image [b, H, W, 3]]; returns [b, ceil(H / 2**level),
    ceil(W / 2**level), c].

    Args:
      strips: that features are cut into, and remain, see `models.strips`.
    """

    def __init__(self, level: int, strips: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.level, self.strips = level, strips

    def call(self, inputs):
        x, image = inputs
        for axis, parts in ((1, self.strips), (2, 1)):
            x = _nearest(x, axis, _ceil_shift(ops.shape(image)[axis], self.level) // parts)
        return x

    def compute_output_shape(self, input_shape):
        x, image = input_shape
        height, width = (n and _ceil_shift(n, self.level) for n in image[1:3])
        return (x[0], height and height // self.strips, width, x[3])

    def get_config(self):
        return super().get_config() | {"level": self.level, "strips": self.strips}


def _ceil_shift(n, level: int):
    return (n + 2**level - 1) // 2**level


def _nearest(x, axis: int, target):
    """Resizes one spatial axis; a static multiple is a repeat, which a TPU does with no gather."""
    source = ops.shape(x)[axis]
    if isinstance(source, int) and isinstance(target, int) and target % source == 0:
        return ops.repeat(x, target // source, axis=axis)
    return ops.take(x, ops.arange(target, dtype="int32") * source // target, axis=axis)
