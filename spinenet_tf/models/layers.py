"""Tensor-in, tensor-out pieces that every network here is built from. `keras.layers` only."""

import dataclasses
import functools

import gin
import keras
from keras import ops

ACTIVATIONS = ("relu", "swish")
NUMERICS = ("official", "model_garden")


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """What all convolutions of a model share.

    Attributes:
      activation: 'relu' (protocols A and B) or 'swish' (protocol C).
      momentum: of the batch-norm moving averages (section 5.1: 0.99).
      epsilon: of batch norm; not stated by the paper, 1e-3 in its first public configs.
      synchronized: batch statistics over all replicas (section 5.1).
      weight_decay: the loss gains weight_decay / 2 * sum of squares of every kernel (section 5.1).
      numerics: 'official' pads stride-2 convolutions symmetrically and shrinks with one max-pool,
        as the paper's code does; 'model_garden' uses SAME padding and repeated max-pools. The
        same weights give different outputs under the two.
    """

    activation: str = "relu"
    momentum: float = 0.99
    epsilon: float = 1e-3
    synchronized: bool = False
    weight_decay: float = 4e-5
    numerics: str = "official"

    def __post_init__(self):
        for field, allowed in (("activation", ACTIVATIONS), ("numerics", NUMERICS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")

    def act(self, x, name: str | None = None):
        """The activation."""
        return keras.layers.Activation(self.activation, name=name)(x)

    def norm(self, x, name: str):
        """Batch normalisation over all axes but the last."""
        return keras.layers.BatchNormalization(
            momentum=self.momentum,
            epsilon=self.epsilon,
            synchronized=self.synchronized,
            name=name,
        )(x)

    def conv_layer(self, filters: int, kernel: int, **kwargs) -> keras.layers.Conv2D:
        """A convolution layer with this style's weight decay; the caller applies it."""
        regularizer = keras.regularizers.L2(self.weight_decay / 2) if self.weight_decay else None
        return keras.layers.Conv2D(filters, kernel, kernel_regularizer=regularizer, **kwargs)

    def conv_bn(self, x, filters: int, kernel: int = 1, strides: int = 1, *, name: str, act=True):
        """Convolution without bias, batch norm and, if `act`, the activation."""
        conv = functools.partial(
            self.conv_layer, filters, kernel, strides=strides, use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(), name=f"{name}_conv",
        )  # fmt: skip
        if strides > 1 and self.numerics == "official":
            x = keras.layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
            x = conv(padding="valid")(x)
        else:
            x = conv(padding="same")(x)
        x = self.norm(x, f"{name}_bn")
        return self.act(x, f"{name}_act") if act else x


def max_pool(x, size: int, strides: int, name: str):
    """SAME max-pooling of [b, h, w, c] to [b, ceil(h / strides), ceil(w / strides), c]."""
    return keras.layers.MaxPooling2D(size, strides, padding="same", name=name)(x)


def block(x, kind: str, filters: int, *, style: Style, drop_path: float, name: str):
    """A bottleneck or residual block of [b, h, w, c] features, stride 1 (ResNet, post-activation).

    The shortcut is projected where c is not the block's output width: in the stem's first block.
    """
    shortcut, conv_bn = x, style.conv_bn
    if kind == "bottleneck":
        width = 4 * filters
        x = conv_bn(x, filters, name=f"{name}_1")
        x = conv_bn(x, filters, 3, name=f"{name}_2")
        x = conv_bn(x, width, name=f"{name}_3", act=False)
    else:
        width = filters
        x = conv_bn(x, filters, 3, name=f"{name}_1")
        x = conv_bn(x, filters, 3, name=f"{name}_2", act=False)
    if shortcut.shape[-1] != width:
        shortcut = conv_bn(shortcut, width, name=f"{name}_shortcut", act=False)
    if drop_path:
        x = StochasticDepth(drop_path, name=f"{name}_drop")(x)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return style.act(x, f"{name}_out")


def resample(x, image, levels: tuple[int, int], squeeze: int, filters: int, *, style: Style, name):
    """A cross-scale connection (section 3.2, Figure 5): 1x1 to `squeeze`, resize, 1x1 to `filters`.

    Args:
      x: [b, h, w, c] features of the parent, at `levels[0]`.
      image: the network's input, whose size says how large `levels[1]` is.
      squeeze: alpha times the 3x3 convolution width of the parent.
    """
    source, target = levels
    x = style.conv_bn(x, squeeze, name=f"{name}_squeeze")
    if target > source:
        x = style.conv_bn(x, squeeze, 3, 2, name=f"{name}_down")
        x = _shrink(x, target - source - 1, style.numerics, name)
    elif target < source:
        x = Upsample(target, name=f"{name}_up")([x, image])
    return style.conv_bn(x, filters, name=f"{name}_expand", act=False)


def _shrink(x, octaves: int, numerics: str, name: str):
    """Halves [b, h, w, c] `octaves` times by max-pooling."""
    if numerics == "model_garden":
        for i in range(octaves):
            x = max_pool(x, 3, 2, f"{name}_pool{i}")
        return x
    if octaves:  # the official code pools once: 3x3 for a factor 2, 5x5 beyond
        x = max_pool(x, 3 if octaves == 1 else 5, 2**octaves, f"{name}_pool")
    return x


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


@keras.saving.register_keras_serializable("spinenet_tf")
class StochasticDepth(keras.layers.Layer):
    """Drops a whole residual branch of an image, and scales the kept ones by 1 / (1 - rate)."""

    def __init__(self, rate: float, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = ReplicaSeeds()

    def call(self, x, training=False):
        if not training:
            return x
        luck = keras.random.uniform((ops.shape(x)[0], 1, 1, 1), seed=self.seed_generator)
        return x * ops.cast(luck >= self.rate, x.dtype) / (1.0 - self.rate)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"rate": self.rate}


@keras.saving.register_keras_serializable("spinenet_tf")
class Upsample(keras.layers.Layer):
    """Nearest-neighbour resize of features to `level` of an image's pyramid.

    A layer, not a function, since only at run time is the size of a dynamic image known. Row i
    reads row floor(i * source / target), so a size that does not divide (224 px: P7 has 2 rows, P5
    has 7) gives what the official code's resize gives.

    Call arguments: [features [b, h, w, c], image [b, H, W, 3]]; returns [b, ceil(H / 2**level),
    ceil(W / 2**level), c].
    """

    def __init__(self, level: int, **kwargs):
        super().__init__(**kwargs)
        self.level = level

    def call(self, inputs):
        x, image = inputs
        for axis in (1, 2):
            x = _nearest(x, axis, _ceil_shift(ops.shape(image)[axis], self.level))
        return x

    def compute_output_shape(self, input_shape):
        x, image = input_shape
        size = (None if n is None else _ceil_shift(n, self.level) for n in image[1:3])
        return (x[0], *size, x[3])

    def get_config(self):
        return super().get_config() | {"level": self.level}


def _ceil_shift(n, level: int):
    return (n + 2**level - 1) // 2**level


def _nearest(x, axis: int, target):
    """Resizes one spatial axis; a static multiple is a repeat, which a TPU does with no gather."""
    source = ops.shape(x)[axis]
    if isinstance(source, int) and isinstance(target, int) and target % source == 0:
        return ops.repeat(x, target // source, axis=axis)
    return ops.take(x, ops.arange(target, dtype="int32") * source // target, axis=axis)
