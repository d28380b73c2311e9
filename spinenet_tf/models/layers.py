"""Tensor-in, tensor-out pieces that every network here is built from. `keras.layers` only."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable

import gin
import keras
from keras import ops

from spinenet_tf.graphs import EXPANSION

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
      stochastic_depth: drop rate of the last block of a backbone; block i of n has
        rate * (i + 1) / n (protocol C: 0.2).
      dropblock_keep: share of the features that DropBlock keeps at the end of training; 1 is off.
        Protocol A has DropBlock, without figures (section 5.1): the default size is that of its
        authors (arXiv 1810.12890), as is where it is: after every convolution of a block and on
        its shortcut.
      dropblock_size: side of the dropped squares, in places of the feature map.
    """

    activation: str = "relu"
    momentum: float = 0.99
    epsilon: float = 1e-3
    synchronized: bool = False
    weight_decay: float = 4e-5
    numerics: str = "official"
    stochastic_depth: float = 0.0
    dropblock_keep: float = 1.0
    dropblock_size: int = 7

    def __post_init__(self):
        for field, allowed in (("activation", ACTIVATIONS), ("numerics", NUMERICS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(f"stochastic_depth={self.stochastic_depth} is not in [0, 1)")
        if not 0 < self.dropblock_keep <= 1:
            raise ValueError(f"dropblock_keep={self.dropblock_keep} is not in (0, 1]")

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

    def decay(self) -> keras.regularizers.Regularizer | None:
        """The regularizer of a kernel."""
        return keras.regularizers.L2(self.weight_decay / 2) if self.weight_decay else None

    def conv_layer(self, filters: int, kernel: int, **kwargs) -> keras.layers.Conv2D:
        """A convolution layer with this style's weight decay; the caller applies it."""
        return keras.layers.Conv2D(filters, kernel, kernel_regularizer=self.decay(), **kwargs)

    def conv_bn(self, x, filters: int, kernel: int = 1, strides: int = 1, *, name: str, act=True):
        """Convolution without bias, batch norm and, if `act`, the activation."""
        x = self.strided(
            functools.partial(
                self.conv_layer, filters, kernel, use_bias=False,
                kernel_initializer=keras.initializers.VarianceScaling(), name=f"{name}_conv",
            ),
            x, kernel, strides, name,
        )  # fmt: skip
        x = self.norm(x, f"{name}_bn")
        return self.act(x, f"{name}_act") if act else x

    def strided(self, make: Callable[..., keras.layers.Layer], x, kernel: int, strides: int, name):
        """Applies the convolution make(strides=, padding=) with the padding of `numerics`."""
        if strides > 1 and self.numerics == "official":
            x = keras.layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
            return make(strides=strides, padding="valid")(x)
        return make(strides=strides, padding="same")(x)

    def depth_rate(self, block: int, blocks: int) -> float:
        """Stochastic depth's rate for block number `block`, from 0, of `blocks`."""
        return self.stochastic_depth * (block + 1) / blocks

    def dropblock(self, x, name: str):
        """DropBlock, where the style has it."""
        if self.dropblock_keep == 1:
            return x
        return DropBlock(1 - self.dropblock_keep, self.dropblock_size, name=name)(x)


def float32(x):
    """Predictions leave the model in float32, under mixed precision as well."""
    return keras.layers.Activation("linear", dtype="float32")(x)


def max_pool(x, size: int, strides: int, name: str):
    """SAME max-pooling of [b, h, w, c] to [b, ceil(h / strides), ceil(w / strides), c]."""
    return keras.layers.MaxPooling2D(size, strides, padding="same", name=name)(x)


def block(
    x, kind: str, filters: int, *, style: Style, drop_path: float, name: str, strides: int = 1,
    project: bool = False,
):  # fmt: skip
    """A bottleneck or residual block of [b, h, w, c] features (ResNet, post-activation).

    The shortcut is projected where it is strided, c is not the block's output width, or on request.

    Raises:
      ValueError: another kind of block.
    """
    if kind not in ("bottleneck", "residual"):
        raise ValueError(f"kind={kind!r} is neither 'bottleneck' nor 'residual'")
    width = filters * EXPANSION[kind]
    shortcut = x
    if project or strides > 1 or x.shape[-1] != width:
        shortcut = style.conv_bn(x, width, 1, strides, name=f"{name}_shortcut", act=False)
        shortcut = style.dropblock(shortcut, f"{name}_shortcut_dropblock")
    plan = [(filters, 1, 1), (filters, 3, strides), (width, 1, 1)]
    plan = plan if kind == "bottleneck" else [(filters, 3, strides), (filters, 3, 1)]
    for i, (channels, kernel, stride) in enumerate(plan, 1):
        last = i == len(plan)
        x = style.conv_bn(x, channels, kernel, stride, name=f"{name}_{i}", act=not last)
        x = style.dropblock(x, f"{name}_{i}_dropblock")
    if drop_path:
        x = StochasticDepth(drop_path, name=f"{name}_drop")(x)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return style.act(x, f"{name}_out")


def fuse(edges: list, style: Style, name: str):
    """The activated sum of [b, h, w, c] features of one shape (section 3.2)."""
    x = keras.layers.Add(name=f"{name}_fuse")(edges) if len(edges) > 1 else edges[0]
    return style.act(x, f"{name}_in")


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
class DropBlock(keras.layers.Layer):
    """Zeroes squares of feature maps and scales the rest up (arXiv 1810.12890, algorithm 1).

    The share that is dropped rises linearly over training (section 3 there), from 0 to `rate`; see
    `training_progress`. On a map smaller than the square, the square is the map.
    """

    def __init__(self, rate: float, size: int, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.size = rate, size
        self.seed_generator = ReplicaSeeds()

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
        luck = keras.random.uniform((shape[0], *room, shape[3]), seed=self.seed_generator)
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
