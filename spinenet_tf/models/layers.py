"""Tensor-in, tensor-out pieces that every network here is built from. `keras.layers` only."""

import dataclasses
import functools
from collections.abc import Callable

import gin
import keras

from spinenet_tf.graphs import EXPANSION
from spinenet_tf.models.device import on_tpu
from spinenet_tf.models.halving import HalvingConv
from spinenet_tf.models.keras_layers import (
    DropBlock,
    ImageConv,
    StochasticDepth,
    Swish,
    Upsample,
    WeightDecay,
)
from spinenet_tf.models.layout import PLAIN, Layout, relay
from spinenet_tf.models.pairs import PairConv
from spinenet_tf.models.pointwise import PointwiseSplit, PointwiseSum
from spinenet_tf.models.recompute import Recomputed
from spinenet_tf.models.stem import Stem
from spinenet_tf.models.strips import Halo, cut, recut

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
      recompute: training keeps the inputs of blocks only and computes the rest again in the
        backward pass. For less memory at more time, with the same results. Of bottleneck and
        residual blocks; MBConv blocks and subnets are kept whole.
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
    recompute: bool = False

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
        if self.activation == "swish" and not on_tpu():
            return Swish(name=name)(x)
        return keras.layers.Activation(self.activation, name=name)(x)

    def norm_layer(self, name: str) -> keras.layers.BatchNormalization:
        """Batch normalisation over all axes but the last; the caller applies it."""
        return keras.layers.BatchNormalization(
            momentum=self.momentum,
            epsilon=self.epsilon,
            synchronized=self.synchronized,
            name=name,
        )

    def norm(self, x, name: str):
        """Batch normalisation over all axes but the last."""
        return self.norm_layer(name)(x)

    def decay(self) -> keras.regularizers.Regularizer | None:
        """The regularizer of a kernel."""
        return WeightDecay(self.weight_decay / 2) if self.weight_decay else None

    def conv_layer(self, filters: int, kernel: int, kind=keras.layers.Conv2D, **kwargs):
        """A convolution layer with this style's weight decay; the caller applies it."""
        return kind(filters, kernel, kernel_regularizer=self.decay(), **kwargs)

    def stem(self, image, filters: int, kernel: int):
        """`conv_bn` of stride 2 on images [b, h, w, 3]."""
        kind = ImageConv if self.numerics == "official" else keras.layers.Conv2D
        return self.conv_bn(image, filters, kernel, 2, name="stem", kind=kind)

    def pooled_stem(self, image, filters: int, layout: Layout = PLAIN):
        """`stem` with a 7x7 kernel, and a max-pool of stride 2."""
        convs, norms = self._held([image.shape[-1]], filters, 7, ["stem"])
        made = layout if layout.columns == 2 else PLAIN
        how = self.numerics == "official", made.columns == 2, made.strips
        x = Stem(convs, norms, self.activation, *how, name="stem")(image)
        return relay(x, made, layout)

    def conv_bn(
        self, x, filters: int, kernel: int = 1, strides: int = 1, *, name: str, act=True,
        kind=keras.layers.Conv2D, layout: Layout = PLAIN,
    ):  # fmt: skip
        """Convolution without bias, batch norm and, if `act`, the activation.

        Of a map in pairs of columns a stride of 2 makes plain columns; strips remain strips.
        """
        channels, padding = x.shape[-1] // layout.columns, "same"
        if layout.strips > 1 and kernel > 1:
            x, padding = self._halo(x, layout.strips, strides), "valid"
        if kernel == strides == 1 and filters > channels:
            x = self.pointwise_sum([x], filters, [name], name, layout.columns)
        elif layout.columns == 2:
            convs, norms = self._held([channels], filters, kernel, [name])
            symmetric = self.numerics == "official"
            x = PairConv(convs, norms, strides, padding, symmetric, name=name)(x)
        else:
            x = self._convolved(x, filters, kernel, strides, padding, name, kind)
            x = self.norm(x, f"{name}_bn")
        return self.act(x, f"{name}_act") if act else x

    def _halo(self, x, strips: int, strides: int):
        """What a 3x3 convolution sees of strips of even sizes."""
        before = int(strides == 1 or self.numerics == "official")
        edges = (before, int(strides == 1 or not before))
        return Halo(strips, edges, edges)(x)

    def _convolved(
        self, x, filters: int, kernel: int, strides: int, padding: str, name: str, kind
    ):  # fmt: skip
        plain = kind is keras.layers.Conv2D and None not in x.shape[1:3]
        if plain and on_tpu() and (kernel, strides) == (3, 2):
            symmetric = self.numerics == "official"
            where = dict(strides=2, padding=padding, name=f"{name}_conv")
            return self.plain_conv(filters, 3, HalvingConv, symmetric=symmetric, **where)(x)
        make = functools.partial(self.plain_conv, filters, kernel, kind, name=f"{name}_conv")
        if padding == "valid":
            return make(padding=padding)(x)
        return self.strided(make, x, kernel, strides, name)

    def plain_conv(self, filters: int, kernel: int, kind=keras.layers.Conv2D, **kwargs):
        """A convolution layer without bias, as batch norm follows; the caller applies it."""
        return self.conv_layer(
            filters, kernel, kind, use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(), **kwargs,
        )  # fmt: skip

    def pointwise_sum(self, inputs: list, filters: int, names: list[str], name: str, columns=1):
        """The sum of `conv_bn` with 1x1 and without activation of maps of one size."""
        channels = [x.shape[-1] // columns for x in inputs]
        convs, norms = self._held(channels, filters, 1, names)
        return PointwiseSum(convs, norms, columns, name=name)(inputs)

    def pointwise_split(self, x, filters: int, names: list[str], name: str, columns=1) -> list:
        """`conv_bn` with 1x1 of one map, several times."""
        convs, norms = self._held([x.shape[-1] // columns] * len(names), filters, 1, names)
        return PointwiseSplit(convs, norms, self.activation, columns, name=name)(x)

    def _held(self, channels: list[int], filters: int, kernel: int, names: list[str]) -> tuple:
        """Convolutions and batch norms, built here so that their weights bear only `names`."""
        convs = [self.plain_conv(filters, kernel, name=f"{name}_conv") for name in names]
        norms = [self.norm_layer(f"{name}_bn") for name in names]
        for conv, norm, width in zip(convs, norms, channels, strict=True):
            conv.build((None, None, None, width))
            norm.build((None, None, None, filters))
        return convs, norms

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
    project: bool = False, layout: Layout = PLAIN,
):  # fmt: skip
    """A bottleneck or residual block of [b, h, w, c] features (ResNet, post-activation).

    The shortcut is projected where it is strided, c is not the block's output width, or on request.
    A strided one is of a plain `layout`.

    Raises:
      ValueError: another kind of block.
    """
    if kind not in ("bottleneck", "residual"):
        raise ValueError(f"kind={kind!r} is neither 'bottleneck' nor 'residual'")
    arguments = dict(
        style=style, drop_path=drop_path, name=name, strides=strides, project=project, layout=layout
    )
    if not style.recompute:
        return _block(x, kind, filters, **arguments)
    image = keras.Input(x.shape[1:], dtype=x.dtype)
    model = keras.Model(image, _block(image, kind, filters, **arguments))
    return Recomputed(model, name=f"{name}_recomputed")(x)


def _block(x, kind, filters, *, style, drop_path, name, strides, project, layout):
    width = filters * EXPANSION[kind]
    shortcut = x
    if project or strides > 1 or x.shape[-1] // layout.columns != width:
        shortcut = style.conv_bn(
            x, width, 1, strides, name=f"{name}_shortcut", act=False, layout=layout
        )
        shortcut = style.dropblock(shortcut, f"{name}_shortcut_dropblock")
    plan = [(filters, 1, 1), (filters, 3, strides), (width, 1, 1)]
    plan = plan if kind == "bottleneck" else [(filters, 3, strides), (filters, 3, 1)]
    for i, (channels, kernel, stride) in enumerate(plan, 1):
        last = i == len(plan)
        x = style.conv_bn(
            x, channels, kernel, stride, name=f"{name}_{i}", act=not last, layout=layout
        )
        x = style.dropblock(x, f"{name}_{i}_dropblock")
    if drop_path:
        x = StochasticDepth(drop_path, layout.strips, name=f"{name}_drop")(x)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return style.act(x, f"{name}_out")


def fuse(edges: list, style: Style, name: str):
    """The activated sum of [b, h, w, c] features of one shape (section 3.2)."""
    x = keras.layers.Add(name=f"{name}_fuse")(edges) if len(edges) > 1 else edges[0]
    return style.act(x, f"{name}_in")


def resize(
    x, image, levels: tuple[int, int], lie: tuple[Layout, Layout], *, style: Style, name: str
):  # fmt: skip
    """[b, h, w, c] squeezed features from `levels[0]` to `levels[1]` (section 3.2, Figure 5).

    Args:
      image: the network's input, whose size says how large `levels[1]` is.
      lie: how the maps of the two levels lie.
    """
    (source, target), (old, new) = levels, lie
    if target == source:
        return x
    if target < source:
        return _enlarge(x, image, target, old, new, name)
    if old.strips > 1 and any(side % 2 for side in x.shape[1:3]):
        x, old = relay(x, old, PLAIN), PLAIN
    filters = x.shape[-1] // old.columns
    x = style.conv_bn(x, filters, 3, 2, name=f"{name}_down", layout=old)
    octaves = target - source - 1
    if not octaves:
        return relay(x, Layout(1, old.strips), new)
    x = recut(x, old.strips, 1)
    return cut(_shrink(x, octaves, style.numerics, name), new.strips)


def _enlarge(x, image, target: int, old: Layout, new: Layout, name: str):
    """Repeats the places of a higher level up to level `target`; pairs of columns as columns."""
    x, old = relay(x, old, Layout(1, old.strips)), Layout(1, old.strips)
    strips = new.strips if x.shape[1] and x.shape[1] * old.strips % new.strips == 0 else 1
    x = recut(x, old.strips, strips)
    x = Upsample(target, strips, name=f"{name}_up")([x, image])
    return relay(x, Layout(1, strips), new)


def _shrink(x, octaves: int, numerics: str, name: str):
    """Halves [b, h, w, c] `octaves` times by max-pooling."""
    if numerics == "model_garden":
        for i in range(octaves):
            x = max_pool(x, 3, 2, f"{name}_pool{i}")
        return x
    if octaves:  # the official code pools once: 3x3 for a factor 2, 5x5 beyond
        x = max_pool(x, 3 if octaves == 1 else 5, 2**octaves, f"{name}_pool")
    return x
